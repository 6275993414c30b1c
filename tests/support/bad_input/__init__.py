"""Malformed calls of ``paged_mlx.fast``, each of which must be refused."""
