"""``mlx_lm.server`` with its models on pages, and what it tells of them over HTTP."""
