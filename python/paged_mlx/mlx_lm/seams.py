"""Replacing parts of mlx-lm while models are enabled, and putting them back."""

import functools
import inspect
import logging
import types

log = logging.getLogger("paged_mlx")

_replaced = []  # (owner, name, what was there)
bodies = {}  # what functions with another body do, by their names


def replace(owner, name: str, make) -> None:
    """Put ``make(before)`` in the place of an attribute."""
    before = getattr(owner, name)
    _set(owner, name, functools.wraps(before)(make(before)))


def replace_body(owner, name: str, make) -> None:
    """Have a function do what ``make(before)`` does, under every name it was imported by."""
    function = inspect.unwrap(getattr(owner, name))
    if not isinstance(function, types.FunctionType) or function.__closure__:
        log.warning("%s is not mlx-lm's, so it does not look for known prompts", name)
        return
    before = types.FunctionType(function.__code__, function.__globals__, name)
    before.__defaults__, before.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    bodies[name] = make(before)
    _set(function, "__defaults__", None)
    _set(function, "__kwdefaults__", None)
    _set(function, "__code__", _BODIES[name].__code__)


def arguments(function, args, options) -> dict:
    """All arguments of a call by their names, defaults too."""
    call = inspect.signature(function).bind(*args, **options)
    call.apply_defaults()
    return call.arguments


def put_back() -> None:
    """Undo everything."""
    while _replaced:
        setattr(*_replaced.pop())
    bodies.clear()


def _set(owner, name: str, value) -> None:
    _replaced.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


# The new bodies run among another module's globals, and a body can close over nothing.


def _generate_step(*args, **options):
    from paged_mlx.mlx_lm.seams import bodies

    return bodies["generate_step"](*args, **options)


def _speculative_generate_step(*args, **options):
    from paged_mlx.mlx_lm.seams import bodies

    return bodies["speculative_generate_step"](*args, **options)


def _save_prompt_cache(*args, **options):
    from paged_mlx.mlx_lm.seams import bodies

    return bodies["save_prompt_cache"](*args, **options)


_BODIES = {
    "generate_step": _generate_step,
    "save_prompt_cache": _save_prompt_cache,
    "speculative_generate_step": _speculative_generate_step,
}
