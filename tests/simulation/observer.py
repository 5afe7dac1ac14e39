"""The one who looks on, after every event, at what clients could do on each node. It shares no code with the product.

A node takes a client's writes if it has power and does not stand still, exports the volume, and has it mounted writable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Seen:
    """One node as it stands for clients; ``epoch`` as its disk has it."""

    node: str
    up: bool
    exported: bool
    writable: bool
    epoch: int

    @property
    def writes(self) -> bool:
        """Whether a client's write succeeds here."""
        return self.up and self.exported and self.writable


@dataclass(slots=True)
class Observer:
    """Remembers what was wrong, in sentences. ``is_forced``: whether a split brain is recorded, on an operator's word."""

    is_forced: Callable[[], bool]
    wrong: list[str] = field(default_factory=list)
    changes: int = 0  # how often another node was the writer
    writer: str = ""
    _epochs: dict[str, int] = field(default_factory=dict)
    _highest: int = 0

    def look(self, at_s: float, nodes: list[Seen]) -> None:
        """Take note of what is seen now."""
        writers = [seen for seen in nodes if seen.writes]
        for seen in nodes:
            before = self._epochs.get(seen.node, 0)
            if seen.epoch < before:
                self.wrong.append(f"{at_s:.3f} s: the epoch on {seen.node} went back from {before} to {seen.epoch}")
            self._epochs[seen.node] = max(before, seen.epoch)
        if len(writers) > 1 and not self.is_forced():
            words = " and ".join(f"{seen.node} at epoch {seen.epoch}" for seen in writers)
            self.wrong.append(f"{at_s:.3f} s: two nodes take writes: {words}")
        for seen in writers:
            if seen.epoch < self._highest and not self.is_forced():
                self.wrong.append(f"{at_s:.3f} s: {seen.node} takes writes at epoch {seen.epoch}, after another did at {self._highest}")
            self._highest = max(self._highest, seen.epoch)
            if seen.node != self.writer:
                self.changes, self.writer = self.changes + 1, seen.node

    def came_to_rest(self, nodes: list[Seen], said: str) -> bool:
        """Whether exactly one node takes writes, or the management node that is in charge asks for the operator."""
        return sum(seen.writes for seen in nodes) == 1 or "holds still" in said or "`landfall serve" in said
