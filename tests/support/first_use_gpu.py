"""The host as a GPU whose kernels may be wrong: for tests of first use."""

from contextlib import contextmanager

import mlx.core as mx
from metal_on_host import metal_on_host
from paged_mlx._native import _ext
from paged_mlx.machine import first_use
from paged_mlx.machine.first_use import Guard

FAULTS = {
    # A score that counts twice; a page of keys one slot off.
    "attend_vector": ("arguments.scale", "(arguments.scale * 1.5f)"),
    "write_pages": ("% arguments.page_size", "% arguments.page_size ^ 1"),
}


def wrong(kernel):
    old, new = FAULTS[kernel]

    def change(dispatch):
        if dispatch["kernel"] != kernel:
            return dispatch
        text = dispatch["text"].replace(old, new)
        assert text != dispatch["text"]
        return dispatch | {"text": text}

    return change


@contextmanager
def gpu(folder, name="a GPU", change=None):
    """The host as a GPU that is new to us; CPU code is still there on a stream of its own."""
    spared = mx.new_stream(mx.cpu)
    guard = Guard(name, mx.cpu, spared, folder)
    with metal_on_host(change=change) as launches:
        _ext.set_host_launch(launches, spared=spared)
        with first_use.guarded_by(guard):
            yield launches
