"""The command line: `commands.py` declares every command with its options, `main.py` runs one."""
