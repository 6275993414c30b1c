"""The errors of the page manager, in one form.

Every message reads ``[function] name must <what>, <why>; got <what>.`` A caller's
mistake is a ``ValueError``; an empty pool is ``OutOfPages``. A call that raises has
changed nothing.
"""

from __future__ import annotations

import operator
from typing import NoReturn

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
