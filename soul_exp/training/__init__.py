"""Training: the steps of an optimizer on the rows of a task, what it requests besides gradients, and checkpoints."""
