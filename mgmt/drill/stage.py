"""A drill's way of saying how far it is: bars on a terminal, one line a step in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agent.contract import messages as m
from agent.system.clock import monotonic_s

Advance = Callable[[int, int], None]
"""How much is done, of how much."""


class Stage:
    """Says what is going on, on standard error."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, sentence: str) -> None:
        """Say one sentence."""
        self._console.print(sentence, markup=False, highlight=False)

    @contextmanager
    def step(self, name: str) -> Iterator[Advance]:
        """Name a step that takes a while; the caller tells how far it is."""
        begun = monotonic_s()
        if self._console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            with Progress(*columns, console=self._console, transient=True) as bars:
                bar = bars.add_task(name, total=None)
                yield lambda done, total: bars.update(bar, completed=done, total=total or None)
        else:
            yield lambda done, total: None
        self._console.print(f"{name:<62} {monotonic_s() - begun:7.1f} s", markup=False, highlight=False)


def teller(advance: Advance) -> Callable[[str, m.Progress], None]:
    """Return what hears an operation's progress."""
    return lambda node, progress: advance(progress.done, progress.total)
