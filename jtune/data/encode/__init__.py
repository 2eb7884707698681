"""Pieces of text as ids, labels and segments."""
