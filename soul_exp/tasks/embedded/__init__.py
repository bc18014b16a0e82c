"""Data that the program generates itself, for runs without a download; the words are in the `_tables` modules."""
