"""Attention from its definition, in NumPy: the oracle, its bounds, and the problems to try it on."""
