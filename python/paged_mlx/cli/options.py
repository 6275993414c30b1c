"""Errors that a user can mend, in one sentence each, and the options that all commands share."""

from __future__ import annotations

import argparse
import importlib.util
import textwrap


class Mistake(Exception):
    """The command cannot run as it was asked for; the message says what to do."""


def parser(
    command: str, description: str, examples: str = "", **options
) -> argparse.ArgumentParser:
    """The parser of one command.

    Args:
        command: Its name.
        description: What it does, in a paragraph.
        examples: Lines to copy.
    """
    return argparse.ArgumentParser(
        prog=f"paged-mlx {command}",
        description=description,
        epilog=f"examples:\n{textwrap.indent(examples.strip(), '  ')}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **options,
    )


def needs_mlx_lm() -> None:
    """Refuse to go on without mlx-lm.

    Raises:
        Mistake: It is not installed.
    """
    if importlib.util.find_spec("mlx_lm") is None:
        raise Mistake("mlx-lm is not installed: pip install mlx-lm")


def count(text: str) -> int:
    """A whole number from 1, as an option's type."""
    values = counts(text)
    if len(values) > 1:
        raise argparse.ArgumentTypeError(f"must be one whole number; got {text}")
    return values[0]


def counts(text: str) -> list[int]:
    """Whole numbers from 1 with commas between them, as an option's type."""
    return whole_numbers(text, 1)


def whole_numbers(text: str, least: int = 0) -> list[int]:
    """Whole numbers with commas between them, as an option's type."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers; got {text}") from None
    if min(found) < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}; got {text}")
    return found


def kv_format(text: str) -> tuple[str | None, str | None]:
    """The formats of K and of V, as ``q8`` or ``q8/q4``, as an option's type."""
    sides = text.split("/")
    if len(sides) > 2 or not set(sides) <= {"q8", "q4", "dense"}:
        raise argparse.ArgumentTypeError(
            f"must be q8, q4 or dense, or two of them as q8/q4 for K and V; got {text}"
        )
    k, v = (None if side == "dense" else side for side in (sides[0], sides[-1]))
    return k, v


def kv_formats(text: str) -> list[tuple[str | None, str | None]]:
    """Formats with commas between them, as an option's type."""
    return [kv_format(part) for part in text.split(",")]


_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def size(text: str) -> int:
    """Bytes, as ``500MB``, ``2GiB`` or a number, as an option's type."""
    word = text.strip().lower().removesuffix("b")
    digits = word.rstrip("kmgi")
    try:
        value = int(float(digits) * _UNITS[word[len(digits) :]])
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"must be bytes, as 500MB or 2GiB; got {text}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 byte; got {text}")
    return value
