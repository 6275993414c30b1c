"""`paged-mlx demo`: a real model answers on paged K and V, and every token is compared."""
