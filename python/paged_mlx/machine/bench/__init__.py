"""The measurements of ``paged-mlx bench``."""
