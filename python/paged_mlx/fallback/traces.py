"""Whether an array stands for an input while ``mx.compile`` traces, which MLX does not say."""

from __future__ import annotations

import threading
import weakref

import mlx.core as mx

_calls = threading.local()
_met = weakref.WeakValueDictionary[int, mx.array]()  # arrays that stood for inputs, by id


def _counted(a):
    _calls.number = getattr(_calls, "number", 0) + 1
    return a


_probe = mx.compile(_counted, shapeless=True)
_NO_TRACER = mx.array(0)


def is_tracer(a: mx.array) -> bool:
    """Whether the array stands for an input while MLX traces; evaluates nothing.

    A compiled function calls what it was made of anew for every array that is traced, and for
    others only once for each kind. Where compiling is switched off it does so for any array.
    """
    if not _is_called_again(a) or _is_called_again(_NO_TRACER):
        return False
    _met[id(a)] = a
    return True


def is_stale(a: mx.array) -> bool:
    """Whether the array was found to stand for an input of a trace that is over."""
    return id(a) in _met and not is_tracer(a)


def _is_called_again(a: mx.array) -> bool:
    _probe(a)  # the first of its kind calls the function too
    before = _calls.number
    _probe(a)
    return _calls.number != before
