"""What a mutant is: one place in one file, changed so that it is wrong."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAYERS = ("kernels", "launch", "contract", "planner", "cpu", "ops", "python")


@dataclass(frozen=True)
class Mutant:
    """A planted fault.

    Attributes:
        name: What is wrong, as a phrase; unique.
        layer: One of ``LAYERS``.
        file: The file it changes, relative to the project.
        find: Text that occurs in the file exactly once.
        replace: What stands there instead.
        seen_by: The case of the layer's suite that is tried first.
        why: Why it is a bug, where the name does not say it.
    """

    name: str
    layer: str
    file: str
    find: str
    replace: str
    seen_by: str
    why: str = ""

    @property
    def text(self) -> str:
        """The whole file, with the fault.

        Raises:
            ValueError: The text to change is not there, or there more than once.
        """
        return changed(self, (ROOT / self.file).read_text())


def changed(mutant: Mutant, text: str) -> str:
    """``text`` with the fault, which it must have a place for."""
    count = text.count(mutant.find)
    if count != 1:
        raise ValueError(
            f"[mutants] the text of {mutant.name!r} must occur once in {mutant.file}; got {count} times."
        )
    return text.replace(mutant.find, mutant.replace)
