"""Every argument of public calls, replaced by values of every other kind.

A call answers an odd value by taking it, or by an error of the one form that has changed
nothing. ``complaints`` tells every other answer.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from paged_mlx.errors import OutOfPages
from paged_mlx.pages.canary import CorruptPage

FORM = re.compile(r"^\[\w[\w.]*\] .+ must .+; got .+\.$", re.DOTALL)

#: One of every kind that people pass by mistake: quick to try.
COMMON: dict[str, Any] = {
    "None": None,
    "text": "x",
    "an object": object(),
    "1.5": 1.5,
    "-1": -1,
    "2**70": 2**70,
    "[None]": [None],
    "an mx.array": mx.ones((4, 64), mx.float16),
}
#: And the rest.
OTHERS: dict[str, Any] = {
    "'causal'": "causal",
    "NaN": float("nan"),
    "2**40": 2**40,
    "10**400": 10**400,
    "True": True,
    "[]": [],
    "['a']": ["a"],
    "[1.5]": [1.5],
    "[2**40]": [2**40],
    "[[0], [0, 1]]": [[0], [0, 1]],
    "[[[0]]]": [[[0]]],
    "a dict": {},
    "a dict of numbers": {0: 1},
    "a dict of text": {"a": 1},
    "a numpy scalar": np.zeros(()),
    "a numpy bool": np.bool_(True),
    "a numpy int": np.int64(3),
    "a numpy array": np.zeros((1, 4, 64), np.float16),
    "a numpy array of ints": np.zeros((2, 3), np.int64),
    "a numpy array of objects": np.array([object()]),
    "a numpy array of text": np.array(["a"]),
    "a flat mx.array": mx.zeros((3,)),
    "an mx.array of float32": mx.ones((1, 4, 64)),
    "an mx.array of ints": mx.zeros((1, 4, 64), mx.int32),
    "an mx.array of complex": mx.zeros((1,), mx.complex64),
    "an empty mx.array": mx.zeros((0, 4, 64), mx.float16),
    "an mx.array of no dimension": mx.array(1),
    "a tuple": (1, 2),
    "a set": {1},
    "bytes": b"x",
    "a type": int,
    "a function": lambda: 1,
    "a complex number": 1j,
    "a dtype": mx.int8,
}

Call = Callable[[Any], tuple[Callable, dict[str, Any]]]


def parameters(function: Callable) -> list[str]:
    """The names of a function's parameters, those that collect the rest left out."""
    kinds = inspect.Parameter
    found = inspect.signature(function).parameters.values()
    return [p.name for p in found if p.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)]


def complaints(
    new_world: Callable[[], Any],
    call: Call,
    values: Mapping[str, Any],
    allowed: tuple[type[BaseException], ...] = (),
) -> list[str]:
    """What is wrong with the answers of one call to odd values, an argument at a time.

    Args:
        new_world: Makes what the call works on: it has ``state()`` and ``check()``.
        call: Gives the function of a world, and sound arguments.
        values: The odd ones by name; a world's own beside them, from ``odd()``, where it has any.
        allowed: Errors that this call may raise too.
    """
    world = new_world()
    function, sound = call(world)
    names = parameters(function)
    assert set(sound) <= set(names), f"{set(sound) - set(names)} are no parameters"
    _run(function, sound)  # or the case proves nothing
    defaults = inspect.signature(function).parameters
    flags = {name for name in names if isinstance(defaults[name].default, bool)}
    wrong, world = [], None
    for name in names:
        for label, value in values.items():
            world = new_world() if world is None else world
            function, sound = call(world)
            before = world.state()
            answer = _answer(function, {**sound, name: value}, allowed)
            if isinstance(answer, str):
                wrong.append(f"{name}={label}: {answer}")
            elif answer is None:
                if name in flags and not isinstance(value, (bool, np.bool_)):
                    wrong.append(f"{name}={label}: a flag took what is no bool")
                world.check()
                world = None  # taken: the next value meets another world
            elif world.state() != before:
                wrong.append(f"{name}={label}: refused, and something has changed")
                world = None
    return wrong


def _run(function: Callable, arguments: dict[str, Any]) -> None:
    """Call, and evaluate what comes out."""
    result = function(**arguments)
    for each in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(each, mx.array):
            mx.eval(each)
        elif isinstance(each, Iterator):
            next(each, None)


def _answer(function, arguments, allowed) -> BaseException | str | None:
    """The error that refuses the arguments; None: they were taken; a text: what is wrong."""
    try:
        return _run(function, arguments)
    except allowed as error:
        return error
    except (ValueError, OutOfPages, CorruptPage) as error:
        if FORM.match(str(error)) or isinstance(error, CorruptPage):
            return error
        return f"an error of another form: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
