"""Where the rows of a task come from.

- `formats`: text, JSON lines, CSV and Parquet files as records.
- `hub`: a dataset of the Hugging Face hub, or a folder in its layout.
- `rows`: a user's records as prompts and answers, checked row by row.
- `text`: running text, general or a user's own.
- `toxic_rows`: texts labelled toxic or not, divided into parts.
"""
