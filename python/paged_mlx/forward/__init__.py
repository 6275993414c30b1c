"""A model's forward pass on pages, whichever library the model is of.

Layers that share tables, one pass after the other in whichever threads, the arrays that a model is
given for K and V, and the hook that takes pages where the model asks MLX for attention. What
knows mlx-lm is in ``paged_mlx.mlx_lm``.
"""
