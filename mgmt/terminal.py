"""What the commands show: tables on a terminal, lines in a pipe, bars on standard error while something takes long."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from agent.contract import messages as m
from mgmt.view import bytes_words, visible

BYTES_FROM = 1 << 20
"""A step with this many to do counts bytes; there is no step with as many of anything else that people wait for."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """Rows under headings; ``note`` is what a person should read below them."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def show(sheets: Sequence[Sheet], *, stderr: bool = False) -> None:
    """Print sheets: tables on a terminal, in a pipe a line a row with tabs between the fields."""
    console = Console(highlight=False, stderr=stderr)
    for sheet in sheets:
        if console.is_terminal:
            table = Table(*sheet.headings, box=None, header_style="dim", padding=(0, 2, 0, 0))
            for row in sheet.rows:
                table.add_row(*(Text(visible(cell), overflow="fold") for cell in row))
            if sheet.rows:
                console.print(table)
        else:
            for row in (sheet.headings, *sheet.rows):
                console.file.write("\t".join(visible(cell) for cell in row) + "\n")
        if sheet.note:
            console.print(
                Text(visible(sheet.note), style="bold") if console.is_terminal else f"# {visible(sheet.note)}", markup=False, soft_wrap=True
            )


def show_json(document: Any) -> None:
    """Print one JSON document, in ASCII."""
    sys.stdout.write(json.dumps(document, indent=1, ensure_ascii=True) + "\n")


def say(sentence: str) -> None:
    """Tell a person something on standard error."""
    sys.stderr.write(visible(sentence) + "\n")


class Bars:
    """A bar per node and step on standard error, with rate and time left; where that is no terminal, a line per step."""

    def __init__(self, *, quiet: bool = False) -> None:
        console = Console(stderr=True, highlight=False)
        self._live = console.is_terminal and not quiet
        self._quiet = quiet
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            _Amount(),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._progress.stop()

    def tell(self, node: str, progress: m.Progress) -> None:
        """Show how far a step is."""
        key = (node, progress.step)
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(f"{node}: {visible(progress.step)}", total=progress.total or None)
            if not self._live and not self._quiet:
                say(f"{node}: {progress.step}")
        self._progress.update(self._tasks[key], completed=progress.done, total=progress.total or None)


class _Amount(ProgressColumn):
    """How much is done, and how fast."""

    def render(self, task: Task) -> Text:
        """Return bytes and bytes a second, or plain numbers."""
        in_bytes = (task.total or 0) >= BYTES_FROM
        words = bytes_words if in_bytes else "{:,}".format
        speed = f", {words(int(task.speed))}/s" if task.speed else ""
        return Text(f"{words(int(task.completed))} of {words(int(task.total or 0))}{speed}", style="dim")
