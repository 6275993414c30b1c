"""docs/commands.md has every command and every option of ours, and no other."""

import argparse
import importlib
import re
from pathlib import Path

import pytest
from paged_mlx.cli.main import COMMANDS

PAGE = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))


def section(name: str) -> str:
    return next(text for title, text in SECTIONS.items() if name in title.split(", "))


def documented(name: str) -> set[str]:
    """The options of the section's table."""
    rows = [line.split("|")[1] for line in section(name).splitlines() if line.startswith("| `-")]
    return {option for row in rows for option in re.findall(r"`(-[\w-]+)`", row)}


def options_of(name: str, monkeypatch) -> set[str]:
    """The options of our parser of a command."""
    found = {}

    def caught(parser, *_, **__):
        for action in parser._actions:
            found.update(dict.fromkeys(action.option_strings))
        raise SystemExit

    for parse in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, parse, caught)
    module = importlib.import_module(f"paged_mlx.{COMMANDS[name].module}")
    with pytest.raises(SystemExit):
        module.main([])
    return set(found) - {"-h", "--help"}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_commands_section_has_its_options_and_an_example(name, monkeypatch):
    assert documented(name) == options_of(name, monkeypatch)
    assert f"\n    paged-mlx {name}" in section(name)


def test_the_first_table_has_every_command():
    head = PAGE.split("\n## ")[0]
    assert set(re.findall(r"`([a-z]+)`", head.split("|---|---|")[1])) == set(COMMANDS)
