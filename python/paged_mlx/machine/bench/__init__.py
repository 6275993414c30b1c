"""What ``paged-mlx bench`` measures, and with what."""
