"""Encoded rows as the batch of every update."""
