"""Pages and their holders: allocators, page tables, copy-on-write. No arrays, no MLX."""
