"""Prefixes found again: pages of earlier sequences, by the hash of their tokens."""
