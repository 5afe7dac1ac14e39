"""What every benchmark here does alike: peers take turns, medians count, and the machine is described beside the figures."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from agent.system.clock import monotonic_s, wall_ns

ROOT: Final = Path(__file__).parents[2]
FOLDER: Final = ROOT / "build" / "bench"


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and when something was measured; ``load`` is the load average at the begin: above the cores it was a busy machine."""

    kernel: str
    cpu: str
    cores: int
    memory_mib: int
    python: str
    load: float
    at_ns: int


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure with what is wanted of it. ``more_is_better``: goal and ``gross`` are lower bounds, else upper ones.

    The goal is that of the full size on a quiet machine; what is beyond ``gross`` is a gross regression at any size on any machine, so
    only ratios have one. ``why``: what stands in the way of the goal and what was tried, shown where it is missed.
    """

    name: str
    value: float
    goal: float | None = None
    unit: str = "x"
    more_is_better: bool = True
    gross: float | None = None
    why: str = ""

    def within(self, bound: float | None) -> bool:
        """Whether the value is on the right side of a bound; a figure without one is for reading."""
        if bound is None:
            return True
        return self.value >= bound if self.more_is_better else self.value <= bound

    @property
    def met(self) -> bool:
        """Whether the goal is met."""
        return self.within(self.goal)

    @property
    def missed_by(self) -> float:
        """By how much of the goal it is missed: 0 if it is met, 0.5 if it is half as good as wanted (or half more than allowed)."""
        if self.goal is None or self.met:
            return 0.0
        return abs(1 - self.value / self.goal)


def machine() -> Machine:
    """Return what this machine is."""
    cpu = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ""
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    return Machine(platform.release(), cpu, os.cpu_count() or 1, memory, platform.python_version(), os.getloadavg()[0], wall_ns())


def alternating(
    tools: Mapping[str, Callable[[], object]], rounds: int, *, before: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Return the seconds of each tool in each round. They take turns in being first; ``before`` is done before each and not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in tools}
    for number in range(rounds):
        for name in turn(list(tools), number):
            before()
            begun = monotonic_s()
            tools[name]()
            seconds[name].append(monotonic_s() - begun)
    return seconds


def turn(names: list[str], number: int) -> list[str]:
    """Return the names in the order of a round: nobody is always first."""
    at = number % len(names)
    return names[at:] + names[:at]


def medians(of: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each."""
    return {name: statistics.median(values) for name, values in of.items() if values}


def cold() -> None:
    """Drop the machine's clean caches (proc(5), drop_caches)."""
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--folder", type=Path, default=FOLDER)
    made.add_argument("--short", action="store_true", help="a form that takes about a minute, for ratios only")
    return made


def parsed(of: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options, and make the folder for the results. SIGTERM ends the process as an error does from here on: it cleans up."""
    asked = of.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    asked.folder.mkdir(parents=True, exist_ok=True)
    return asked


def keep(asked: argparse.Namespace, name: str, measured: Any, figures: Sequence[Figure], described: Machine) -> int:
    """Write NAME.json into the folder asked for: the machine, the figures with their goals, what was measured. Print the figures.

    Return the exit status: 1 if the short form was asked for and a figure is beyond its ``gross``; a goal that is missed is no failure.
    """
    kept = [replace(figure, goal=None) for figure in figures] if asked.short else list(figures)
    document = {
        "bench": name,
        "short": asked.short,
        "machine": asdict(described),
        "figures": [{**asdict(figure), "met": figure.met, "missed_by": figure.missed_by} for figure in kept],
        "measured": asdict(measured),
    }
    (asked.folder / f"{name}.json").write_text(json.dumps(document, indent=1))
    status = 0
    for figure in kept:
        bound = "at least" if figure.more_is_better else "at most"
        words = [f"{name}: {figure.name}: {figure.value:.3g} {figure.unit}"]
        if figure.goal is not None:
            words.append(f"(goal: {bound} {figure.goal:g}{'' if figure.met else f'; MISSED by {figure.missed_by:.0%}'})")
        if asked.short and not figure.within(figure.gross):
            words.append(f"GROSS REGRESSION: it should be {bound} {figure.gross:g} anywhere")
            status = 1
        sys.stdout.write(" ".join(words) + "\n")
    sys.stdout.flush()
    return status
