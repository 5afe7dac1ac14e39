"""A thousand runs from a thousand seeds, each of them looked at; and proof that the one who looks would see what is wrong."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from agent.contract import messages as m
from agent.serving import keeper
from agent.serving.tenure import Tenure, Tenures
from mgmt.catalog import Catalog, VolumeEntry
from mgmt.failover import steps
from mgmt.failover.plan import Step
from mgmt.fencing import lease
from mgmt.run import Site, volumes
from mgmt.watch import cycle
from tests.simulation.play import Outcome, Stage, play
from tests.simulation.schedule import Act, Happening, Schedule, schedule

ROOT = Path(__file__).resolve().parents[2]
BATCH = 125


def words(outcome: Outcome) -> str:
    replay = f"replay: python -m tests.simulation --seed {outcome.schedule.seed} --verbose"
    return "\n".join((f"seed {outcome.schedule.seed}", *outcome.wrong, replay))


@pytest.mark.parametrize("batch", range(8))
def test_I7_one_writer_in_every_run(batch: int) -> None:
    outcomes = [play(schedule(seed)) for seed in range(1 + batch * BATCH, 1 + (batch + 1) * BATCH)]
    assert not (wrong := [words(outcome) for outcome in outcomes if outcome.wrong]), "\n\n".join(wrong)
    assert sum(outcome.changes > 1 for outcome in outcomes) > BATCH // 10, "hardly any run got as far as a failover"


def test_the_same_seed_is_the_same_run() -> None:
    argv = [sys.executable, "-m", "tests.simulation", "--seed", "468", "--verbose"]
    said = {
        subprocess.run(argv, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": salt}, capture_output=True, text=True, check=True).stdout
        for salt in ("1", "2")
    }
    runs = {"\n".join(text.splitlines()[:-1]) for text in said}  # the last line has the processor's time
    assert len(runs) == 1
    assert play(schedule(468)).digest != play(schedule(469)).digest


LATE = (Happening(20.0, Act.CUT, "nas1", "nas2", 90.0), Happening(20.0, Act.CUT, "nas1", "mgmt1", 90.0))
BY_LEASE = Schedule(7, "lease", True, 24.0, LATE)
BY_LONG_LEASE = replace(BY_LEASE, lease_s=80.0)
BY_SWITCH = replace(BY_LEASE, fence="command")


def no_waiting(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "sleep", lambda seconds: None)


def no_margin(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper that gives up long after the end of the lease."""
    monkeypatch.setattr(keeper, "is_over", lambda tenure, now_ns, margin_s: False)


def no_fence(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(steps.ACTIONS, Step.FENCE, lambda work: {"proved": True, "words": "nobody looked"})


Sabotage = Callable[[Stage, pytest.MonkeyPatch], None]


@pytest.mark.parametrize("found", [BY_LEASE, BY_LONG_LEASE, BY_SWITCH])
def test_what_is_sabotaged_below_is_well_without_that(found: Schedule) -> None:
    outcome = play(found)
    assert not outcome.wrong
    assert outcome.changes == 2, "it failed over"


@pytest.mark.parametrize(
    ("found", "sabotage"), [(BY_LONG_LEASE, no_waiting), (BY_LEASE, no_margin), (BY_LONG_LEASE, no_fence), (BY_SWITCH, no_fence)]
)
def test_the_observer_sees_two_writers(found: Schedule, sabotage: Sabotage, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = play(found, sabotage=lambda stage: sabotage(stage, monkeypatch))
    assert any("two nodes take writes" in sentence for sentence in outcome.wrong), "\n".join(outcome.log)


# What runs of the simulation found once: what happened, and how it comes back if what mended it is undone.


def nobody_asks_for_an_open_failover(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service lets a node serve that a failover has fenced, or waits for."""
    monkeypatch.setattr(cycle, "_unfinished", lambda site, entry: None)
    monkeypatch.setattr(Catalog, "failover_open", lambda self, volume: False)
    monkeypatch.setattr(Site, "alone", lambda self, volume: contextlib.nullcontext())


def served_without_a_lease_until_the_first_renewal(monkeypatch: pytest.MonkeyPatch) -> None:
    def let_serve(site: Site, entry: VolumeEntry, node: str, epoch: int) -> m.VolumeFacts:
        return site.node(node).ask(m.ServeVolume(entry.id, epoch))

    monkeypatch.setattr(volumes, "let_serve", let_serve)
    monkeypatch.setattr(steps, "let_serve", let_serve)


def a_lease_counts_whoever_may_renew_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Catalog, "lease", lambda self, volume, node: 24.0)


def what_is_mounted_is_taken_for_served(monkeypatch: pytest.MonkeyPatch) -> None:
    confirm = Tenures.confirm

    def confirmed(self: Tenures, volume: UUID, name: str, epoch: int, lease_until_ns: int | None) -> Tenure:
        tenure = confirm(self, volume, name, epoch, lease_until_ns)
        self.serve(tenure)
        return tenure

    monkeypatch.setattr(Tenures, "confirm", confirmed)


ONE_WAY = Happening(7.0, Act.CUT_ONE_WAY, "nas2", "nas1", 60.0)  # so that it does not hear that its address is taken
BACK_TOO_SOON = (ONE_WAY, Happening(26.5, Act.DECLARE_DEAD, "mgmt1"), Happening(34.0, Act.POWER_CUT, "nas1", seconds=6.4))
CUT_OFF_AS_IT_SERVES = (
    Happening(12.0, Act.CUT_AT, "nas1", "", 100.0, "serve.after_export"),
    Happening(12.5, Act.POWER_CUT, "nas1", seconds=3.0),
    Happening(45.0, Act.DECLARE_DEAD, "mgmt1"),
)
TAKEN_OVER_UNHEARD = (
    Happening(20.0, Act.CUT, "nas1", "nas2", 100.0),
    Happening(20.0, Act.CUT, "nas1", "mgmt2", 100.0),
    Happening(22.0, Act.TAKE_OVER, "mgmt2"),
    Happening(40.0, Act.DECLARE_DEAD, "mgmt2"),
)
DIES_BEFORE_IT_EXPORTS = (Happening(1.0, Act.DIE_AT, "nas1", "", 5.0, "serve.before_export"),)


@pytest.mark.parametrize(
    ("happenings", "undo"),
    [
        (BACK_TOO_SOON, nobody_asks_for_an_open_failover),
        (CUT_OFF_AS_IT_SERVES, served_without_a_lease_until_the_first_renewal),
        (TAKEN_OVER_UNHEARD, a_lease_counts_whoever_may_renew_it),
        (DIES_BEFORE_IT_EXPORTS, what_is_mounted_is_taken_for_served),
    ],
)
def test_what_was_found_once(
    happenings: tuple[Happening, ...], undo: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Schedule(1, "lease", False, 24.0, happenings)
    assert not play(found).wrong
    undo(monkeypatch)
    assert play(found).wrong
