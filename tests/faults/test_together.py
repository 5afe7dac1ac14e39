"""Several volumes frozen together: what is taken of them is of one moment, and whatever dies, clients go on."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest

from agent.contract import messages as m
from agent.contract.errors import FreezeFailed, LandfallError, NoSuchVolume, RequestRefused
from agent.contract.identity import FilesystemKind, GenerationId
from agent.system.clock import wait_until
from tests.faults.case import served
from tests.faults.phases import write_within
from tests.faults.rig import NodeProcess, Pair
from tests.faults.test_review_verbs import SIZE

TAKES = 6


class Writer:
    """Writes a counter alternately: to the first volume the cause, then to the second the effect."""

    def __init__(self, cause: Path, effect: Path) -> None:
        self._paths = (cause / "counter", effect / "counter")
        self._ending = threading.Event()
        self.count = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        fds = [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in self._paths]
        try:
            while not self._ending.is_set():
                for fd in fds:
                    os.pwrite(fd, f"{self.count + 1:020}".encode(), 0)
                self.count += 1
        finally:
            for fd in fds:
                os.close(fd)

    @contextmanager
    def writing(self) -> Iterator[None]:
        self._thread.start()
        try:
            self.advanced()
            yield
        finally:
            self._ending.set()
            self._thread.join(30)
            assert not self._thread.is_alive(), "a filesystem is still frozen"

    def advanced(self) -> None:
        """Wait until it has written more."""
        seen = self.count
        assert wait_until(lambda: self.count > seen + 10, 30.0)


def two(pair: Pair, kind: FilesystemKind = FilesystemKind.EXT4) -> tuple[UUID, UUID, Path, Path]:
    cause, effect = (pair.create(name, kind, SIZE[kind]) for name in ("cause", "effect"))
    one, other = (Path(served(pair.nas1, volume).mount_point) for volume in (cause, effect))
    return cause, effect, one, other


def counter(node: NodeProcess, generation: GenerationId) -> int:
    opened = Path(node.ask(m.OpenGeneration(generation)).path)
    try:
        return int((opened / "counter").read_bytes())
    finally:
        node.ask(m.CloseGeneration(generation))


@pytest.mark.parametrize("kind", list(FilesystemKind))
def test_no_generation_shows_an_effect_without_its_cause(pair: Pair, kind: FilesystemKind) -> None:
    cause, effect, one, other = two(pair, kind)
    writer, sets, apart = Writer(one, other), [], []
    with writer.writing():
        for number in range(TAKES):
            order = (cause, effect) if number % 2 else (effect, cause)
            taken = pair.nas1.ask(m.TakeTogether(order))
            assert [facts.id.volume for facts in taken.generations] == list(order)
            assert len({facts.taken_ns for facts in taken.generations}) == 1
            assert 0 < taken.frozen_ms < 10_000
            by_volume = {facts.id.volume: facts.id for facts in taken.generations}
            sets.append((by_volume[cause], by_volume[effect]))
            writer.advanced()
        for _ in range(TAKES):
            first = pair.take(cause)
            writer.advanced()
            apart.append((first, pair.take(effect)))
    ahead = [counter(pair.nas1, first) - counter(pair.nas1, second) for first, second in sets]
    assert set(ahead) <= {0, 1}, ahead
    assert any(counter(pair.nas1, first) < counter(pair.nas1, second) for first, second in apart), "the writer finds those that are not"


@pytest.mark.parametrize(
    ("point", "whole"),
    [
        ("substrate.take.before_freeze", 0),
        ("substrate.take.frozen", 0),
        ("substrate.take.after_thaw", 0),
        ("substrate.take.before_rename:2", 1),
        ("substrate.take.after", 2),
    ],
)
def test_the_agent_dies_and_both_are_thawed_and_each_generation_is_whole_or_not_there(pair: Pair, point: str, whole: int) -> None:
    cause, effect, one, other = two(pair)
    name, _, passing = point.partition(":")
    pair.nas1.kill()
    pair.nas1.start_armed(f"{name}=kill:{passing or 1}")
    with pytest.raises((LandfallError, OSError)):
        pair.nas1.ask(m.TakeTogether((cause, effect)))
    pair.nas1.died_by(name)
    for root in (one, other):
        write_within(root / "while dead", 30.0)
    pair.nas1.start()
    assert sum(len(served(pair.nas1, volume).generations) - 1 for volume in (cause, effect)) == whole
    assert len(pair.nas1.ask(m.TakeTogether((cause, effect))).generations) == 2


def test_a_freeze_that_takes_too_long_is_ended_and_leaves_nothing_of_the_order(pair: Pair) -> None:
    cause, effect, one, other = two(pair)
    pair.nas1.kill()
    pair.nas1.start_armed("substrate.take.frozen=stop")
    failed: list[LandfallError] = []

    def ask() -> None:
        try:
            pair.nas1.ask(m.TakeTogether((cause, effect)))
        except LandfallError as error:
            failed.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    assert wait_until(pair.nas1.stopped, 30.0)
    for root in (one, other):
        write_within(root / "meanwhile", 60.0)  # the guards' time is over, though nobody told them
    pair.nas1.go_on()
    asking.join(60.0)
    assert [type(error) for error in failed] == [FreezeFailed]
    assert [len(served(pair.nas1, volume).generations) for volume in (cause, effect)] == [1, 1]


def test_an_order_that_fails_for_one_leaves_none(pair: Pair) -> None:
    cause, effect, one, other = two(pair)
    pair.nas1.kill()
    pair.nas1.start_armed("substrate.take.before_rename=raise:2")
    with pytest.raises(LandfallError):
        pair.nas1.ask(m.TakeTogether((cause, effect)))
    assert [len(served(pair.nas1, volume).generations) for volume in (cause, effect)] == [1, 1]
    for root in (one, other):
        write_within(root / "afterwards", 30.0)
    with pytest.raises(NoSuchVolume):
        pair.nas1.ask(m.TakeTogether((cause, UUID(int=9))))
    for wrong in ((), (cause, cause)):
        with pytest.raises(RequestRefused):
            pair.nas1.ask(m.TakeTogether(wrong))
    pair.nas1.ask(m.StopServing(effect))
    assert len(pair.nas1.ask(m.TakeTogether((cause, effect))).generations) == 2, "one of them is not mounted"
