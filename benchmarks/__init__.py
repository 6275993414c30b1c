"""Benchmarks: one harness, one file for each question, results as JSON records."""
