"""Encoded rows in files."""
