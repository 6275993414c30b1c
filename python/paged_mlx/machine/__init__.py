"""This machine: its memory, threads and thresholds, and whether paged attention is right on it."""
