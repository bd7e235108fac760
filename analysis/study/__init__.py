"""A study: its plan and the files of its runs in, study.json, tables and figures out."""
