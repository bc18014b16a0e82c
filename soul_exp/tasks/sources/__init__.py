"""Where the rows of a task come from: files and the hub, as records, prompts and answers, or running text."""
