"""One mutant against its layer's suite, in a process of its own: ``python -m mutants.trial``.

Prints one line of JSON on stdout: ``{"case": ..., "reason": ...}``, both null for a mutant
that nobody saw.
"""

import importlib
import importlib.machinery
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .mutant import ROOT, Mutant, changed


class MutantModule:
    """Finds ``paged_mlx._ext`` at a path of its own."""

    def __init__(self, path: str):
        self.path = path

    def find_spec(self, name, path=None, target=None):
        if name == "paged_mlx._ext":
            return importlib.util.spec_from_file_location(name, self.path)
        return None


class ChangedSource(importlib.machinery.SourceFileLoader):
    """Finds the module that a mutant of Python changes, and loads it with the fault."""

    def __init__(self, mutant: Mutant):
        path = ROOT / mutant.file
        parts = path.relative_to(ROOT / "python").with_suffix("").parts
        self.is_package_itself = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if self.is_package_itself else parts)
        super().__init__(name, str(path))
        self.mutant = mutant

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        folders = [str(Path(self.path).parent)] if self.is_package_itself else None
        return importlib.util.spec_from_file_location(
            name, self.path, loader=self, submodule_search_locations=folders
        )

    def path_stats(self, path):
        raise OSError("what is compiled already is not the changed text")

    def get_data(self, path):
        return self.mutant.text.encode()


class ChangedText:
    """Plants a fault in the text of every kernel that includes its file."""

    def __init__(self, mutant: Mutant):
        self.mutant, self.applied = mutant, 0

    def __call__(self, dispatch: dict) -> dict:
        if self.mutant.find in dispatch["text"]:
            dispatch["text"] = changed(self.mutant, dispatch["text"])
            self.applied += 1
        return dispatch


def order(cases: dict, mutant: Mutant) -> list[str]:
    """The case that should see the mutant, then those about the same kernel or module, then the rest."""
    subject = _subject(mutant.seen_by)
    rest = sorted(cases, key=lambda name: _subject(name) != subject)
    return [mutant.seen_by] + [name for name in rest if name != mutant.seen_by]


def _subject(case: str) -> str:
    return re.split("[,.]", case)[0]


def _reason(case: Callable[[], str | None]) -> str | None:
    """Why a case fails; what it raises is a reason."""
    try:
        return case()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def try_kernel(mutant: Mutant) -> tuple[str | None, str | None]:
    """The case that saw a fault in the kernels' text, and how."""
    from .kernels_suite import CASES

    plant = ChangedText(mutant)
    for name in order(CASES, mutant):
        before = plant.applied
        reason = _reason(partial(CASES[name], plant))
        if reason and plant.applied == before:
            return None, f"{name} fails without the fault: {reason}"
        if reason:
            return name, reason
    return None, None if plant.applied else "its text was never launched"


def cases_of(mutant: Mutant) -> dict[str, Callable[[], str | None]]:
    """The suite of a mutant's layer, without a fault in the kernels' text."""
    suite = "api" if mutant.layer in ("ops", "python") else mutant.layer
    return importlib.import_module(f".{suite}_suite", __package__).cases(mutant)


def try_module(mutant: Mutant) -> tuple[str | None, str | None]:
    """The case that saw a fault in the native module, which is already in place."""
    cases = cases_of(mutant)
    for name in order(cases, mutant):
        reason = _reason(cases[name])
        if reason:
            return name, reason
    return None, None


def main() -> None:
    from . import find

    mutant = find(sys.argv[1])
    if len(sys.argv) > 2:
        sys.meta_path.insert(0, MutantModule(sys.argv[2]))
    if mutant.layer == "python":
        sys.meta_path.insert(0, ChangedSource(mutant))
    attempt = try_kernel if mutant.layer == "kernels" else try_module
    print(f"trying {mutant.seen_by}", file=sys.stderr)
    case, reason = attempt(mutant)
    print(json.dumps({"case": case, "reason": reason}))


if __name__ == "__main__":
    main()
