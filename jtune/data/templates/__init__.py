"""Conversations as pieces of text."""
