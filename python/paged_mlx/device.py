"""Where an operation runs."""

import mlx.core as mx

from paged_mlx._native import _ext

_HAS_GPU = mx.metal.is_available()


def runs_kernels(stream: mx.Stream | mx.Device | None) -> bool:
    """Whether operations on a stream run Metal kernels: on the GPU, or on the host in tests.

    Args:
        stream: Stream or device; None: the default device.
    """
    return (_HAS_GPU and _is_gpu(stream)) or _ext.has_host_launch()


def _is_gpu(stream) -> bool:
    if stream is None:
        stream = mx.default_device()
    device = stream.device if isinstance(stream, mx.Stream) else stream
    return device == mx.gpu
