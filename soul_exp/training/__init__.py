"""Training: the steps of an optimizer on the rows of a task, what it asks for besides gradients, and checkpoints."""
