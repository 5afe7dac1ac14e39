"""The service against two scripted agents: what a cycle does for a volume, and the sentence it says."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from agent.contract import messages as m
from agent.contract.errors import BaseMismatch, ConfigInvalid, FailoverBusy, LinkLost
from agent.contract.identity import GenerationId, empty_generation
from agent.system.files import lock_for_life
from mgmt import run
from mgmt.catalog import TransferEntry
from mgmt.failover.driver import failover
from mgmt.failover.plan import Sight, Wish
from mgmt.inventory import Inventory
from mgmt.run import Site, replication
from mgmt.watch import cycle, service
from mgmt.watch.cycle import Watch
from mgmt.watch.decision import Act, Decision, Member, decide, in_step
from mgmt.watch.schedule import next_due_ns
from tests.unit.mgmt_pair import Pair, die, lose
from tests.unit.test_mgmt_failover import fence_by

NOON_S = 1_795_435_200  # 2026-11-23 12:00:00 UTC
SECOND_NS = 10**9


@dataclass
class Scene:
    """A volume under watch, with a clock that a test turns."""

    pair: Pair
    site: Site
    now_s: float = NOON_S
    jobs: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.watch = Watch(
            self.pair.site, lambda job, name: self.jobs.append(job), now_ns=lambda: int(self.now_s * SECOND_NS), now_s=lambda: self.now_s
        )

    def cycle(self) -> str:
        (sentence,) = self.watch.cycle(self.site)
        return sentence

    def automatic(self) -> None:
        self.site.inventory = replace(self.site.inventory, automatic_failover=True)

    def work(self) -> None:
        while self.jobs:
            self.jobs.pop(0)()


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(replication, "FIRST_PAUSE_S", 0.001)
    pair = Pair(tmp_path)
    with pair.site() as site:
        pair.with_volume(site)
        made = Scene(pair, site)
        monkeypatch.setattr(replication, "wall_ns", lambda: int(made.now_s * SECOND_NS))
        yield made


def scheduled(scene: Scene, schedule: str = "hourly") -> Scene:
    run.set_volume(scene.site, "projects", schedule=schedule)
    return scene


def test_without_a_schedule_it_waits_to_be_told(scene: Scene) -> None:
    assert scene.cycle() == "projects waits to be told: it has no schedule."
    assert not scene.jobs


def test_what_was_never_replicated_is_due_at_once_and_then_when_the_schedule_says(scene: Scene) -> None:
    scheduled(scene)
    assert "replicates: it was never replicated" in scene.cycle()
    assert "replicates: it was never replicated" in scene.cycle()
    assert len(scene.jobs) == 1, "one job at a time"
    scene.work()
    assert scene.cycle() == "projects waits until 2026-11-23 13:00:00 UTC."
    scene.now_s += 3599
    assert "waits" in scene.cycle()
    scene.now_s += 1
    assert "due at 2026-11-23 13:00:00 UTC" in scene.cycle()
    scene.work()
    assert len(scene.pair.nas2.said(m.ReceiveTransfer)) == 2
    said = [entry.sentence for entry in scene.site.catalog.history(scene.site.catalog.volume("projects").id)]
    assert sum(sentence.startswith("replicated g0000000") for sentence in said) == 2


def test_a_link_that_breaks_is_tried_again_after_a_pause_that_grows(scene: Scene) -> None:
    scheduled(scene)
    scene.cycle()
    scene.pair.fails = [lose(LinkLost)] * 12  # more than one order tries by itself
    scene.work()
    first = scene.cycle()
    assert first.startswith("projects waits until 2026-11-23 12:00:15 UTC to try again")
    scene.now_s += 15
    assert "goes on with g00000001" in scene.cycle()
    scene.work()
    assert "waits until 2026-11-23 12:00:45 UTC to try again" in scene.cycle()
    scene.now_s += 30
    scene.cycle()
    scene.pair.fails = []
    scene.work()
    assert scene.cycle() == "projects waits until 2026-11-23 13:00:00 UTC."
    assert len(scene.pair.nas1.said(m.TakeGeneration)) == 1, "what broke off was gone on with"


def test_what_only_an_operator_can_mend_is_not_tried_over_and_over(scene: Scene) -> None:
    scheduled(scene)
    scene.cycle()
    scene.pair.fails = [lose(BaseMismatch)]
    scene.work()
    assert scene.cycle().startswith("projects holds still: [base-mismatch]")
    scene.now_s += 60
    assert scene.cycle().startswith("projects holds still: [base-mismatch]")
    assert not scene.jobs


def test_C11_a_silent_primary_is_given_time_and_then_left_to_the_operator(scene: Scene) -> None:
    scheduled(scene)
    scene.cycle()
    scene.pair.fails = [die()]
    scene.work()
    assert scene.cycle() == "projects waits: nas1 does not answer, and may be silent for 0.1 s."
    scene.now_s += 1
    assert scene.cycle() == "projects holds still: nas1 does not answer; `landfall failover projects` is an operator's to say."
    assert not scene.jobs
    facts = scene.watch.observed["projects"].facts
    for seen in (None, Sight(agent=False, ours=False, peers=True, words="nas2 reaches it")):
        decision = decide(replace(facts, seen=seen, automatic=True))
        assert decision.act is Act.HOLD, "one witness is not enough"
        assert decision.sentence.startswith("holds still: nas1 does not answer, and is not gone (nas2 ")


def test_a_failover_that_wants_no_operator_happens_and_the_returned_node_is_left_to_one(scene: Scene) -> None:
    fence_by(scene.pair, 0)
    scheduled(scene)
    scene.cycle()
    scene.work()
    scene.now_s += 3600
    scene.cycle()
    scene.pair.fails = [die()]
    scene.work()
    scene.automatic()
    scene.cycle()
    scene.now_s += 1
    assert scene.cycle() == "projects fails over: nas1 answers neither here nor to nas2."
    assert scene.cycle() == "projects fails over: nas1 answers neither here nor to nas2.", "it is under way"
    scene.work()
    assert scene.pair.role["nas2"] is m.Role.PRIMARY, scene.cycle()
    said = [entry.sentence for entry in scene.site.catalog.history(scene.site.catalog.volume("projects").id)]
    assert "failed over to nas2." in said, said
    assert scene.cycle().startswith("projects waits: nas1 does not answer"), "what was the primary is the secondary now"


def test_I3_a_primary_that_came_up_serves_when_it_is_told_that_nobody_took_over(scene: Scene) -> None:
    scene.pair.serving["nas1"] = False
    assert scene.cycle() == "projects lets nas1 serve: it came up, and nas2 was not promoted meanwhile."
    assert scene.pair.serving["nas1"]
    assert "waits" in scene.cycle()


def test_a_lease_counts_when_the_node_said_that_it_has_it_and_in_the_term_in_which_it_said_so(scene: Scene) -> None:
    scene.pair.fence = "lease"
    with scene.pair.site() as site:
        scene.watch.cycle(site)
        volume = site.catalog.volume("projects").id
        assert site.catalog.lease(volume, "nas1") == 0.0, "it did not take the lease, and may serve without"
        scene.pair.nas1.handlers[m.RenewLease] = lambda asked: m.Lease(asked.seconds)
        scene.pair.nas1.asked.clear()
        scene.watch.cycle(site)
        assert site.catalog.lease(volume, "nas1") == site.inventory.lease_s
        assert [asked.seconds for asked in scene.pair.nas1.said(m.RenewLease)] == [site.inventory.lease_s]
        site.catalog.set_term(2)
        assert site.catalog.lease(volume, "nas1") == 0.0, "who was in charge before may still renew it"


def test_what_an_operator_ended_is_not_begun_again_and_not_forgotten(scene: Scene) -> None:
    (facts,) = scene.pair.facts("nas1")
    scene.pair.nas1.handlers[m.ListVolumes] = lambda _: m.Volumes((replace(facts, rests=True, confirmed=True),))
    said = "projects waits to be told: it has no schedule; nas1 was told to stop serving it, `landfall serve projects` lets it."
    assert scene.cycle() == said


def test_C8_a_service_waits_where_another_management_node_took_over(scene: Scene) -> None:
    scene.pair.nas2.handlers[m.ListVolumes] = lambda _: m.Volumes(scene.pair.facts("nas2"), term=7)
    waits = "projects waits: another management node is in charge, in term 7; `landfall takeover` puts this one in charge."
    assert scene.cycle() == waits
    scene.site.catalog.set_term(7)
    assert scene.cycle() == "projects waits to be told: it has no schedule."


def test_C5_nobody_is_let_serve_until_a_failover_that_broke_off_is_done(scene: Scene) -> None:
    fence_by(scene.pair, 0)
    run.replicate(scene.site, "projects")
    scene.pair.nas1.dead = True
    site = scene.pair.site()
    scene.pair.nas2.handlers[m.PromoteVolume] = lambda _: (_ for _ in ()).throw(LinkLost("as the script says"))
    with pytest.raises(LinkLost):
        failover(site, "projects", Wish())
    scene.pair.nas1.dead, scene.pair.serving["nas1"] = False, False
    command = "holds still: a failover broke off at the step promote; `landfall failover projects` goes on with it."
    assert scene.cycle() == f"projects {command}"
    with pytest.raises(FailoverBusy):
        run.serve(site, "projects")
    assert not scene.pair.serving["nas1"], "it was fenced, and what was proved has to stay true"
    with site.alone(site.catalog.volume("projects").id):
        assert scene.cycle() == "projects waits: a failover is at the step promote."
    scene.automatic()
    assert scene.cycle() == "projects goes on with the failover that broke off at the step promote."


def test_a_salvage_is_the_operators_to_go_on_with(scene: Scene) -> None:
    scene.pair.fails = [die()]
    with pytest.raises(Exception, match="nas1"):
        run.replicate(scene.site, "projects")
    run.salvage_volume(scene.site, "projects", declare_dead=True)
    scene.now_s += 10
    assert scene.cycle().startswith("projects holds still: nas2 holds a salvaged generation")


def test_C8_a_second_service_waits_and_says_so(tmp_path: Path) -> None:
    inventory = Inventory(state_dir=tmp_path, cycle_s=0.01)
    held = lock_for_life(tmp_path / "watch.lock")
    said: list[str] = []
    told = threading.Event()

    def say(sentence: str) -> None:
        said.append(sentence)
        told.set()

    second = threading.Thread(target=lambda: service.watch(inventory, say, once=True))
    second.start()
    assert told.wait(30)
    assert second.is_alive()
    assert said == ["waits: another service watches these volumes."]
    os.close(held)
    second.join(30)
    assert not second.is_alive()


def test_the_calendar_is_systemds() -> None:
    assert next_due_ns("hourly", NOON_S) == (NOON_S + 3600) * SECOND_NS
    assert next_due_ns("Mon..Fri 04:00 Europe/Berlin", NOON_S) == (NOON_S + 15 * 3600) * SECOND_NS
    assert next_due_ns("*:*:0/5", NOON_S + 1) == (NOON_S + 5) * SECOND_NS
    assert next_due_ns("2020-01-01", NOON_S) is None
    for wrong in ("every now and then", "--help", "25:00"):
        with pytest.raises(ConfigInvalid):
            next_due_ns(wrong, NOON_S)


def test_volumes_of_a_set_are_replicated_together_or_not_at_all() -> None:
    due, rests = Decision(Act.REPLICATE, "replicates: it was due"), Decision(Act.WAIT, "waits until noon")
    silent, going_on = Decision(Act.WAIT, "waits: nas2 does not answer"), Decision(Act.REPLICATE, "goes on with g00000002, which broke off")
    for own, hinders, said in (
        ((rests, rests), (False, False), ("waits until noon", "waits until noon")),
        ((due, due), (False, False), ("replicates: it was due, together with log", "replicates: it was due, together with database")),
        ((due, silent), (False, True), ("waits for log, which waits: nas2 does not answer", "waits: nas2 does not answer")),
        ((silent, silent), (True, True), ("waits: nas2 does not answer",) * 2),
        (
            (rests, going_on),
            (False, False),
            (
                "waits for log, which goes on with g00000002, which broke off",
                "goes on with g00000002, which broke off, together with database",
            ),
        ),
        ((due, going_on), (False, True), ("waits for log, which goes on with g00000002, which broke off", going_on.sentence)),
    ):
        members = tuple(Member(name, *about) for name, *about in zip(("database", "log"), own, hinders, strict=True))  # type: ignore[arg-type]
        assert tuple(decision.sentence for decision in in_step(members)) == said
    assert in_step((Member("alone", due, hinders=False),)) == (due,)


def test_a_set_is_due_when_the_first_of_its_volumes_is_and_is_one_only_on_one_primary(scene: Scene) -> None:
    site = scene.site
    one = run.set_volume(site, "projects", schedule="hourly", together="erp")
    assert site.catalog.volumes() == [one]
    other = replace(one, id=UUID(int=2), name="log", schedule="*:0/30")
    third = replace(other, id=UUID(int=3), name="third", schedule="", together="")
    assert cycle._sets([one, other, third]) == [[one, other], [third]]
    assert cycle._sets([one, replace(other, primary="nas2")]) == [[one], [replace(other, primary="nas2")]]
    assert cycle._due_ns(site, [one, other]) == 0, "one was never replicated"
    for number, begun_s in ((one.id, NOON_S), (other.id, NOON_S + 60)):
        generation = GenerationId(number, 1, 1, "0" * 32)
        site.catalog.begin_transfer(
            TransferEntry(uuid4(), number, empty_generation(number), generation, m.Differential.VERIFY, begun_s * SECOND_NS)
        )
    assert cycle._due_ns(site, [one, other]) == (NOON_S + 1800) * SECOND_NS
    assert cycle._due_ns(site, [one, replace(other, schedule="")]) == (NOON_S + 3600) * SECOND_NS
    assert cycle._due_ns(site, [third]) is None
