"""Who holds which page: allocators, page tables, copy-on-write. No arrays, no MLX."""
