"""Data that the program generates itself, for runs without a download.

- `corpus` (words in `corpus_tables`): fictitious authors, a story, everyday text, general knowledge.
- `general_suite` (words in `general_suite_tables`): the utility suite and the rows that teach what it asks.
- `insults`: provocations with insults, friendly questions with polite answers.
"""
