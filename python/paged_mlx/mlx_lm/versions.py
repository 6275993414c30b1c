"""The versions of mlx-lm whose caches this adapter knows."""

import logging
import re

TESTED = ("0.31.3", "0.32.0", "0.32.2")
SHOWS_WHOLE_PROMPTS = "0.32.0"  # from here on logits processors see a prompt's first tokens too

log = logging.getLogger("paged_mlx")


def check(installed: str) -> None:
    """Refuse an mlx-lm that is too old, and log a warning for one that is newer than any tested.

    Raises:
        ImportError: Its caches have another contract.
    """
    if not is_at_least(installed, TESTED[0]):
        raise ImportError(
            f"paged_mlx.enable needs mlx-lm {TESTED[0]} or newer, because the caches of older ones "
            f"have another contract; mlx-lm {installed} is installed: run `pip install -U mlx-lm`."
        )
    if _number(installed) > _number(TESTED[-1]):
        log.warning(
            "paged_mlx was tested with mlx-lm %s; mlx-lm %s is installed", TESTED[-1], installed
        )


def is_at_least(installed: str, version: str) -> bool:
    """Whether a version is ``version`` or newer."""
    return _number(installed) >= _number(version)


def _number(version: str) -> tuple[int, ...]:
    """The release of a version: (0, 32, 2) of "0.32.2.dev1+abc"."""
    found = re.match(r"\d+(\.\d+)*", version)
    assert found is not None, f"{version!r} is no version"
    return tuple(int(part) for part in found.group().split("."))
