"""Where the rows of a task come from.

- `records`: text, JSON lines, CSV and Parquet files, datasets of the Hugging Face hub and folders in its layout.
- `rows`: a user's records as prompts and answers, checked row by row.
- `text`: running text, general or a user's own.
- `toxic_rows`: texts labelled toxic or not, divided into parts.
"""
