"""The errors of the page manager, in one form.

Every message reads ``[function] name must <what>, <why>; got <what>.`` A caller's
mistake is a ``ValueError``; an empty pool is ``OutOfPages``. A call that raises has
changed nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NoReturn

import numpy as np

MAX_INT32 = 2**31 - 1


class PageError(ValueError):
    """A page id was used in a way its state does not allow."""


class UnknownPage(PageError):
    """The page id does not belong to this allocator."""


class DoubleFree(PageError):
    """The page is free: it was freed before, or never allocated."""


class UseAfterFree(PageError):
    """The page is free, and the call needs one that somebody holds."""


class OutOfPages(RuntimeError):
    """The pool has too few pages left, counting those that could be evicted."""


def fail(function: str, must: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raise ``error`` in the one form of message."""
    raise error(f"[{function}] {must}; got {got}.")


def kind_of(value: object) -> str:
    """What a value of the wrong type is, in few words."""
    if isinstance(value, (str, int, float, type(None))):
        return repr(value)
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def whole_number(
    function: str, name: str, value: object, minimum: int = 0, maximum: int = MAX_INT32
) -> int:
    """Return ``value`` as an int in ``[minimum, maximum]``.

    Raises:
        ValueError: ``value`` is no whole number, or is outside; a bool is none.
    """
    try:
        number = minimum - 1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = minimum - 1
    if number < minimum:
        fail(function, f"{name} must be a whole number of at least {minimum}", repr(value))
    if number > maximum:
        fail(function, f"{name} must be at most {maximum}", number)
    return number


def check_flag(function: str, name: str, value: object) -> bool:
    """Return ``value`` as a bool.

    Raises:
        ValueError: It is none, nor a bool of numpy.
    """
    if not isinstance(value, (bool, np.bool_)):
        fail(function, f"{name} must be True or False", kind_of(value))
    return bool(value)


def check_kind(function: str, name: str, value: object, kind: type) -> None:
    """Refuse what is no ``kind``.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, kind):
        fail(function, f"{name} must be a {kind.__name__}", kind_of(value))


def as_list(function: str, name: str, values: Iterable[Any], of: str) -> list[Any]:
    """Return ``values`` as a list.

    Args:
        of: What they are, for the message.

    Raises:
        ValueError: They cannot be listed.
    """
    try:
        return list(values)
    except (TypeError, ValueError):  # ValueError: an mx.array without a dimension
        fail(function, f"{name} must be a sequence of {of}", kind_of(values))


def holders(function: str, name: str, values: Iterable[Any], of: str) -> list[Any]:
    """``as_list`` of what holds pages: tables, caches.

    Raises:
        ValueError: One of them holds none.
    """
    listed = as_list(function, name, values, of)
    for value in listed:
        if not hasattr(value, "page_ids"):
            fail(function, f"{name} must be a sequence of {of}", f"{kind_of(value)} in it")
    return listed
