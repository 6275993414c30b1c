"""Formats of pages: K and V in fewer bits, each in its own way."""
