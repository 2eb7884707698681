"""The command line: one file, `main.py`, that names each command and where it lives."""
