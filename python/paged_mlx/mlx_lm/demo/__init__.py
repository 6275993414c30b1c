"""What `paged-mlx demo` runs: a real model answers on paged K and V, and every token is compared."""
