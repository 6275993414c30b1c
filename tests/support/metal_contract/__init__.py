"""MLX's Metal encoder without a Mac: the project's code for a GPU, judged by MLX's contract.

``native/`` has the headers of MLX's Metal device that ``csrc/metal/mlx_encoder.cpp`` includes,
and behind them a stand-in that plays ``gpu::eval``: it takes the command buffer before a node is
evaluated, adds its completion handler after, and commits by MLX's counts. The native module,
built against it (``build``), takes the place of the project's in a process of its own::

    python -m metal_contract [--ops N] [--megabytes N] [--threads N] PYTEST_ARGUMENTS

There every test that runs ``metal_on_host`` goes Python -> C++ -> ``eval_gpu`` -> ``MlxEncoder``
-> stand-in -> kernel text, and finds among its findings what ``Judge`` and the stand-in saw:

- a commit, or an end of the encoding, inside an evaluation; a handler after a commit;
- a dispatch that meets what another one wrote, or writes what another one reads, with neither
  a barrier nor a fence between them;
- a buffer that a kernel writes and that is not registered as an output;
- a buffer that nobody holds until its command buffer completes;
- a pipeline that does not exist, or that takes fewer threads;
- more than Metal's 31 buffers, 4 KiB of bytes, 32 KiB of threadgroup memory.
"""
