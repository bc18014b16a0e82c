"""Measuring a model on a task: answers to its probes, the utility suite, and answers in files."""
