"""What the documents point at exists: files, links, tests by name, error codes, and the words of the command line."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/claim.md", "agent/contract/FORMAT.md")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name: str) -> None:
    document = ROOT / name
    targets = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    assert name.endswith("FORMAT.md") or targets
    for target in targets:
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_test_that_is_named_is_there(name: str) -> None:
    for path, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / name).read_text()):
        source = ROOT / path
        assert source.is_file(), path
        assert not test or re.search(rf"^def {test}\(", source.read_text(), re.MULTILINE), f"{path}::{test}"


def test_the_readmes_commands_are_ones_that_exist() -> None:
    from mgmt.cli import landfall

    words = re.findall(r"^landfall ([\w-]+)(?: ([a-z]+))?", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert words
    for verb, below in words:
        command = landfall.get_command(click.Context(landfall), verb)
        group = getattr(command, "commands", None)
        assert group is None or below in group, f"landfall {verb} {below}"


def test_the_readmes_command_lines_are_taken_word_for_word() -> None:
    from mgmt.cli import landfall

    lines = re.findall(r"^landfall (.+?)(?: +#.*)?$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(lines) > 5
    for line in lines:
        words = line.split()
        command = landfall.get_command(click.Context(landfall), words.pop(0))
        assert command is not None
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        command.make_context(line, words)


def test_the_readme_has_the_drills_own_output() -> None:
    assert "@DRILL@" not in (ROOT / "README.md").read_text()
