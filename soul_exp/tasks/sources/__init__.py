"""Where the rows of a task come from.

- `hub`: a dataset of the Hugging Face hub, or a folder in its layout.
- `formats`: JSON lines, CSV, Parquet and hub datasets as records.
- `rows`: a user's records as prompts and answers, checked row by row.
- `text`: running text, general or a user's own.
- `toxic_rows`: texts labelled toxic or not, divided into parts.
"""
