"""Files, folders and the hub as tables."""
