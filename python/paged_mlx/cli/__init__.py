"""The command ``paged-mlx``: a file for each of its commands, imported when it is asked for."""
