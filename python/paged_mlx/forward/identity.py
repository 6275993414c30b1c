"""Everything that K and V depend on besides tokens: a model's weights, configuration and rank."""

import hashlib
import weakref

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from paged_mlx._native import _ext

PLAIN = (bool, int, float, complex, str, bytes, type(None), mx.Dtype)


def parts_of(model):
    """(name, array or plain value) of all that a model holds: parameters, hidden arrays, scales
    of adapters, bases of positions, its configuration."""
    seen = set()

    def walk(name, value):
        if isinstance(value, (mx.array, *PLAIN)):
            yield name, value
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                yield from walk(f"{name}.{i}", item)
        elif isinstance(value, dict) or hasattr(value, "__dict__"):
            if id(value) in seen:
                return
            seen.add(id(value))
            items = dict(value) if isinstance(value, dict) else {}
            if isinstance(value, nn.Module) or not isinstance(value, (dict, type)):
                items |= _attributes(value)
            for key in sorted(items, key=str):
                yield from walk(f"{name}.{key}", items[key])

    return walk("", model)


def _attributes(value) -> dict:
    """What an object holds that decides what it computes: no functions, and nothing of ours."""
    return {
        key: item
        for key, item in vars(value).items()
        if key not in ("make_cache", "_no_grad")
        and not callable(item)
        or isinstance(item, nn.Module)
    }


class Identity:
    """What a model is now; its arrays are not held.

    Args:
        place: The rank, and how many there are.
    """

    def __init__(self, model, place: tuple[int, int]):
        self.place = place
        self._model = weakref.ref(model)
        self._parts = [(name, _note(value)) for name, value in parts_of(model)]
        self._digest: str | None = None

    def has_changed(self) -> bool:
        """Whether the model is another now, by an array, a plain attribute or a layer."""
        model = self._model()
        if model is None:
            return True
        now = list(parts_of(model))
        return len(now) != len(self._parts) or not all(
            name == before and _is_same(noted, value)
            for (before, noted), (name, value) in zip(self._parts, now)
        )

    @property
    def digest(self) -> str:
        """The same in another process for the same weights, configuration and rank; read from the
        weights once, an array at a time."""
        if self._digest is None:
            digest = hashlib.sha256()
            for name, value in [*parts_of(self._model()), ("rank", self.place)]:
                digest.update(_digest(name, value))
            self._digest = digest.hexdigest()
        return self._digest


def _note(value):
    return (weakref.ref(value), _ext.descriptor(value)) if isinstance(value, mx.array) else value


def _is_same(noted, value) -> bool:
    if isinstance(value, mx.array):
        return (
            isinstance(noted, tuple) and noted[0]() is value and noted[1] == _ext.descriptor(value)
        )
    return type(noted) is type(value) and (noted == value or noted != noted)


def _digest(name: str, value) -> bytes:
    if not isinstance(value, mx.array):
        return hashlib.sha256(f"{name} {value!r}".encode()).digest()
    return array_digest(name, value)


def array_digest(name: str, array: mx.array) -> bytes:
    """The SHA-256 of an array's name, shape, dtype and bytes."""
    digest = hashlib.sha256(f"{name} {array.shape} {array.dtype}".encode())
    if array.size:
        flat = array.reshape(-1)
        if flat.dtype == mx.bfloat16:
            flat = flat.view(mx.uint16)
        digest.update(np.array(flat, copy=False).view(np.uint8).data)
    return digest.digest()
