"""What is to be forgotten. A task is a function that builds a `Task`: plain data that training and evaluation read.

- `tofu`: fictitious authors (Maini et al. 2024); forgets the last ones, retains the others.
- `copyright`: passages of a book; forgets them, holds out other passages of the same book, retains general text.
- `detox`: toxic answers to provocations or comments; retains polite answers and general text.
- `custom`: rows that a user brings, at once or as a sequence of requests.

`task` defines `Task` and `Probe`; `sources` reads files and the hub, `embedded` generates data without a download.
"""
