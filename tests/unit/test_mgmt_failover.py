"""Failover: the plan from facts, the refusals, and the driver against two scripted agents, killed at every step."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.contract import messages as m
from agent.contract.errors import (
    AddressTaken,
    DeviceFailed,
    EpochStale,
    FailoverBusy,
    FailpointHit,
    FenceMissing,
    FenceUnproved,
    LandfallError,
    NodeUnreachable,
    NoSuchGeneration,
    NoSuchVolume,
    PrimaryAlive,
    SplitBrain,
    TransferBusy,
    VerifyFailed,
)
from agent.contract.identity import FilesystemKind, GenerationId, GenerationKind, empty_generation
from mgmt import run
from mgmt.catalog import VolumeEntry
from mgmt.failover import driver, plan
from mgmt.failover.account import Account, account
from mgmt.failover.journal import Journal
from mgmt.failover.plan import Facts, FailoverKind, Life, Sight, Step, Wish
from mgmt.inventory import FenceOptions
from mgmt.run import replication
from tests.unit.mgmt_dmis import VOLUME
from tests.unit.mgmt_pair import Pair, S, die

ENTRY = VolumeEntry(VOLUME, "projects", "nas1", "nas2", FilesystemKind.EXT4, 1 << 30, address="10.77.0.100/24")
GONE, HERE = Sight(False, False, False), Sight(True, True, True)
ADDRESS = "10.77.0.100/24"
STATES = Path(plan.__file__).with_name("states.dot")
FENCE = """
import json, sys
asked = json.loads(sys.stdin.readline())
code = int(sys.argv[1])
print(json.dumps({"words": "not this time"} if code else {key: asked[key] for key in ("node", "volume", "epoch")} | {"proof": "it is off"}))
open(sys.argv[2], "a").write("fenced\\n")
sys.exit(code)
"""


# --- the plan ---


def generation(counter: int, kind: GenerationKind = GenerationKind.COMMITTED, epoch: int = 1) -> m.GenerationFacts:
    number = GenerationId(VOLUME, epoch, counter, f"{counter:032x}") if counter else empty_generation(VOLUME)
    return m.GenerationFacts(number, kind, counter)


def held(role: m.Role, *generations: m.GenerationFacts, epoch: int = 1) -> m.VolumeFacts:
    state = m.ReplicaState.UP_TO_DATE
    return m.VolumeFacts(VOLUME, "projects", FilesystemKind.EXT4, 1 << 30, role, state, epoch, False, "", "", generations)


def facts(**changes: Any) -> Facts:
    known = Facts(ENTRY, GONE, None, held(m.Role.SECONDARY, generation(1)), (), "lab")
    return dataclasses.replace(known, **changes)


ALIVE = {"sight": HERE, "source": held(m.Role.PRIMARY, generation(1))}


def reception(state: m.TransferState) -> m.TransferFacts:
    pair = Pair(Path())
    return pair.transfer(VOLUME, generation(1).id, generation(2).id, sending=False, state=state)


def test_C11_one_witness_is_never_enough() -> None:
    assert Sight(False, False, False).life is Life.GONE
    assert Sight(False, False, True).life is Life.SILENT
    assert Sight(False, True, False).life is Life.SILENT
    assert Sight(True, True, False).life is Life.ALIVE


def test_I1_a_lost_primary_is_fenced_before_anything_else() -> None:
    made = plan.plan(facts(), Wish())
    assert made.steps == (Step.FENCE, Step.PROMOTE, Step.ADDRESS, Step.SERVE, Step.RECORD)
    assert (made.epoch, made.fence, made.address) == (2, "lab", ADDRESS)


@pytest.mark.parametrize("state", [S.WAITING, S.RUNNING, S.INTERRUPTED])
def test_I8_what_is_in_flight_is_salvaged_first(state: m.TransferState) -> None:
    made = plan.plan(facts(transfers=(reception(state),)), Wish())
    assert made.steps[:3] == (Step.FENCE, Step.SALVAGE, Step.PROMOTE)
    assert made.transfer == VOLUME


@pytest.mark.parametrize("state", [S.SALVAGED, S.COMMITTED])
def test_I8_what_is_salvaged_or_committed_is_promoted_as_it_is(state: m.TransferState) -> None:
    assert Step.SALVAGE not in plan.plan(facts(transfers=(reception(state),)), Wish()).steps


def test_I18_a_planned_one_hands_over_before_it_takes_over() -> None:
    made = plan.plan(facts(**ALIVE), Wish(planned=True))
    assert made.steps == (*plan.HAND_OVER, *plan.TAKE_OVER)
    assert made.fence == ""
    never = held(m.Role.SECONDARY, generation(0, GenerationKind.EMPTY))
    assert plan.plan(facts(**ALIVE, target=never), Wish(planned=True)).steps == made.steps


@pytest.mark.parametrize(
    ("changes", "wish", "error"),
    [
        (ALIVE, Wish(), PrimaryAlive),
        ({"sight": Sight(False, False, True)}, Wish(), PrimaryAlive),
        ({"sight": Sight(False, True, False)}, Wish(), PrimaryAlive),
        ({"fence": ""}, Wish(), FenceMissing),
        ({"fence": ""}, Wish(declare_dead=True), FenceMissing),
        ({"split_brain": True}, Wish(), SplitBrain),
        ({**ALIVE, "split_brain": True}, Wish(planned=True), SplitBrain),
        ({"target": held(m.Role.SECONDARY, generation(0, GenerationKind.EMPTY))}, Wish(), NoSuchGeneration),
        ({"target": held(m.Role.PRIMARY, generation(1), epoch=2)}, Wish(), EpochStale),
        ({"volume": dataclasses.replace(ENTRY, epoch=3)}, Wish(), EpochStale),
        ({"volume": dataclasses.replace(ENTRY, epoch=3)}, Wish(force=True), EpochStale),
        ({**ALIVE, "source": held(m.Role.PRIMARY, epoch=2)}, Wish(planned=True), EpochStale),
        ({}, Wish(planned=True), NodeUnreachable),
        ({**ALIVE, "transfers": (reception(S.SALVAGED),)}, Wish(planned=True), TransferBusy),
    ],
)
def test_what_is_refused_says_why_and_what_to_do(changes: dict[str, Any], wish: Wish, error: type[LandfallError]) -> None:
    with pytest.raises(error) as refused:
        plan.plan(facts(**changes), wish)
    assert refused.value.fix_now


def test_what_is_declared_dead_is_fenced_all_the_same() -> None:
    assert plan.plan(facts(**ALIVE), Wish(declare_dead=True)).steps[0] is Step.FENCE
    assert plan.plan(facts(fence=""), Wish(force=True)).forced


def test_the_picture_of_the_states_shows_every_step_and_every_order_there_is() -> None:
    drawn = set(re.findall(r"^ *(\w+) -> (\w+)", STATES.read_text(), re.MULTILINE))
    plans = [plan.plan(facts(**ALIVE), Wish(planned=True)), plan.plan(facts(), Wish())]
    plans.append(plan.plan(facts(transfers=(reception(S.INTERRUPTED),)), Wish()))
    followed = {(one.value, other.value) for made in plans for one, other in zip(made.steps, made.steps[1:], strict=False)}
    assert followed <= drawn
    assert {name for edge in drawn for name in edge} >= {step.value for step in Step}


# --- the driver ---


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A volume with an address, replicated once; the fence of nas1 proves itself."""
    monkeypatch.setattr(replication, "FIRST_PAUSE_S", 0.001)
    made = Pair(tmp_path)
    fence_by(made, 0)
    with made.site() as site:
        made.with_volume(site)
        run.set_volume(site, "projects", address=ADDRESS)
        run.replicate(site, "projects")
    made.address["nas1"] = ADDRESS
    return made


def fence_by(pair: Pair, code: int) -> None:
    (pair.folder / "fence.py").write_text(FENCE)
    program = (sys.executable, str(pair.folder / "fence.py"), str(code), str(pair.folder / "fenced"))
    pair.fence, pair.fence_options = "command", FenceOptions(program=program)


def fences(pair: Pair) -> int:
    path = pair.folder / "fenced"
    return len(path.read_text().split()) if path.exists() else 0


def break_off(pair: Pair) -> None:
    """Let nas1 die in the middle of a transfer."""
    pair.fails = [die()]
    with pair.site() as site, pytest.raises(NodeUnreachable):
        run.replicate(site, "projects")


def fail_over(pair: Pair, wish: Wish | None = None) -> Account:
    with pair.site() as site:
        done = driver.failover(site, "projects", wish or Wish())
        assert done
        return done


def changing(pair: Pair) -> list[Any]:
    """What was ordered that changes anything."""
    kinds = (m.PromoteVolume, m.DemoteVolume, m.ServeVolume, m.StopServing, m.TakeAddress, m.DropAddress, m.UpdateInstruction)
    return [order for agent in pair.agents.values() for order in agent.asked if isinstance(order, kinds)]


def assert_taken_over(pair: Pair) -> None:
    assert (pair.role["nas2"], pair.epoch["nas2"], pair.serving["nas2"], pair.address["nas2"]) == (m.Role.PRIMARY, 2, True, ADDRESS)
    with pair.site() as site:
        entry = site.catalog.volume("projects")
        assert (entry.primary, entry.secondary, entry.epoch) == ("nas2", "nas1", 2)
        assert not site.catalog.failover_open(entry.id)
        (said,) = site.catalog.history(entry.id, kind="failover")
        assert said.times == 1


def test_I1_the_secondary_takes_over_and_says_what_it_took(pair: Pair) -> None:
    break_off(pair)
    done = fail_over(pair)
    assert_taken_over(pair)
    orders = [type(order) for order in changing(pair)]
    assert orders == [m.UpdateInstruction, m.PromoteVolume, m.TakeAddress, m.ServeVolume]
    assert (done.files_recovered, done.files_changed) == (2, 5)
    assert done.proof == "it is off"
    assert not done.split_brain
    spent = done.seconds
    assert spent.total == pytest.approx(spent.detect + spent.fence + spent.determine + spent.recover + spent.serve + spent.waited)
    assert spent.fence > 0
    assert done.lost.volume >= done.lost.recovered
    with pair.site() as site:
        (evidence,) = Journal(site.catalog).evidence(done.volume)
        assert (evidence.node, evidence.epoch, evidence.proved) == ("nas1", 1, True)
        assert run.standing(site, "projects").pending == ()


def test_changes_may_be_lost_up_to_the_fence_however_long_the_transfer_had_been_broken_off(pair: Pair) -> None:
    break_off(pair)
    done = fail_over(pair)
    with pair.site() as site:
        entry = Journal(site.catalog).entries(done.volume)[-1]
    earlier = dataclasses.replace(entry, lost_ns=entry.lost_ns - 3600 * 10**9)
    seen, known = account(earlier), account(earlier, earlier.lost_ns)
    assert seen.lost == done.lost, "it served on, and only the fence ended that"
    assert seen.seconds.total == known.seconds.total == pytest.approx(done.seconds.total + 3600)
    assert known.lost.volume < done.lost.volume, "who knows the moment need not assume the worst"


def test_I8_a_reception_without_a_dmi_is_given_up_and_the_base_is_served(pair: Pair) -> None:
    break_off(pair)

    def nothing(_: m.FetchDmi) -> bytes:
        from agent.contract.errors import NoSuchTransfer

        raise NoSuchTransfer("no DMI here")

    pair.nas2.handlers[m.FetchDmi] = nothing
    done = fail_over(pair)
    assert_taken_over(pair)
    assert done.transfer is None
    assert done.generation.startswith("g00000001")


STEPS_LOST = [Step.FENCE, Step.SALVAGE, *plan.TAKE_OVER]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS_LOST)
def test_C5_C6_C7_it_goes_on_at_the_step_where_it_stopped(pair: Pair, monkeypatch: pytest.MonkeyPatch, step: Step, when: str) -> None:
    break_off(pair)
    monkeypatch.setenv("LANDFALL_ALLOW_FAILPOINTS", "1")
    monkeypatch.setenv("LANDFALL_FAILPOINTS", f"failover.{when}_{step}=raise:{passings(f'failover.{when}_{step}') + 1}")
    with pair.site() as site, pytest.raises(FailpointHit):
        driver.failover(site, "projects", Wish())
    monkeypatch.setenv("LANDFALL_FAILPOINTS", "")
    before = fences(pair)
    with pair.site() as site:
        if step is not Step.RECORD:
            with pytest.raises(FailoverBusy):
                run.replicate(site, "projects")
        made, first = driver.preview(site, "projects", Wish())
        assert first is step
        assert made.epoch == 2
    done = fail_over(pair)
    assert_taken_over(pair)
    assert done.files_recovered == 2
    assert fences(pair) - before == (1 if step is Step.FENCE else 0), "a proof that is recorded is enough"
    with pair.site() as site:
        assert len([entry for entry in site.catalog.salvages(done.volume) if entry.undone_ns is None]) == 1


def passings(name: str) -> int:
    from agent.system import failpoint

    return failpoint._passed[name]


def test_I18_a_planned_one_loses_nothing_and_the_old_primary_follows(pair: Pair) -> None:
    done = fail_over(pair, Wish(planned=True))
    assert_taken_over(pair)
    assert (pair.role["nas1"], pair.epoch["nas1"], pair.serving["nas1"], pair.address["nas1"]) == (m.Role.SECONDARY, 2, False, "")
    assert (done.kind, done.lost.volume, fences(pair)) == (FailoverKind.PLANNED, 0.0, 0)
    orders = [
        type(order)
        for agent in (pair.nas1, pair.nas2)
        for order in agent.asked
        if type(order) in {m.StopServing, m.DemoteVolume, m.PromoteVolume}
    ]
    assert orders == [m.StopServing, m.DemoteVolume, m.PromoteVolume]
    assert pair.nas1.said(m.StopServing)[0].quiesce
    with pair.site() as site:
        run.replicate(site, "projects")
    assert pair.generations["nas1"][-1].id == pair.generations["nas2"][-1].id


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", [*plan.HAND_OVER, *plan.TAKE_OVER])
def test_C_a_planned_one_goes_on_where_it_stopped(pair: Pair, monkeypatch: pytest.MonkeyPatch, step: Step, when: str) -> None:
    name = f"failover.{when}_{step}"
    monkeypatch.setattr(driver, "failpoint", broken_at(name))
    with pair.site() as site, pytest.raises(KilledError):
        driver.failover(site, "projects", Wish(planned=True))
    monkeypatch.undo()
    fail_over(pair, Wish(planned=True))
    assert_taken_over(pair)


class KilledError(BaseException):
    """Stands for the death of the management process: nothing catches it."""


def broken_at(name: str) -> Callable[[str], None]:
    def failpoint(passed: str) -> None:
        if passed == name:
            raise KilledError

    return failpoint


def test_a_planned_one_that_fails_before_the_handover_is_taken_back(pair: Pair) -> None:
    held_back = pair.nas2.handlers[m.ReceiveTransfer]
    calls: list[int] = []

    def refuse(asked: m.ReceiveTransfer) -> m.Listening:
        calls.append(1)
        if len(calls) > 1:
            raise VerifyFailed("as the script says")
        answer: m.Listening = held_back(asked)
        return answer

    pair.nas2.handlers[m.ReceiveTransfer] = refuse
    with pair.site() as site:
        with pytest.raises(VerifyFailed) as failed:
            driver.failover(site, "projects", Wish(planned=True))
        assert "serves projects again" in "".join(failed.value.__notes__)
        assert not site.catalog.failover_open(site.catalog.volume("projects").id)
    assert (pair.serving["nas1"], pair.address["nas1"], pair.role["nas1"]) == (True, ADDRESS, m.Role.PRIMARY)
    assert pair.nas2.said(m.PromoteVolume) == []


def test_a_planned_one_whose_source_dies_on_the_way_makes_room_for_one_that_is_not(pair: Pair) -> None:
    pair.nas1.handlers[m.StopServing] = lambda _: (_ for _ in ()).throw(EOFError())
    with pair.site() as site, pytest.raises(NodeUnreachable):
        driver.failover(site, "projects", Wish(planned=True))
    done = fail_over(pair)
    assert_taken_over(pair)
    assert done.kind is FailoverKind.UNPLANNED


@pytest.mark.parametrize("code", [1, 3, 4, 5, 6, 7])
def test_I16_without_proof_nothing_is_promoted(pair: Pair, code: int) -> None:
    break_off(pair)
    fence_by(pair, code)
    with pair.site() as site:
        for _ in range(2):
            with pytest.raises(FenceUnproved) as refused:
                driver.failover(site, "projects", Wish())
            assert "not this time" in refused.value.cause
        assert changing(pair) == []
        assert [found.code for found in Journal(site.catalog).evidence(site.catalog.volume("projects").id)] == [code, code]
    fence_by(pair, 0)
    fail_over(pair)
    assert_taken_over(pair)


def test_I10_what_is_forced_is_recorded_as_a_split_brain_and_replication_stops(pair: Pair) -> None:
    pair.cut_off = {"nas1"}
    fence_by(pair, 4)
    done = fail_over(pair, Wish(force=True))
    assert done.split_brain
    assert "WITHOUT PROOF" in done.sentence
    pair.cut_off = set()
    with pair.site() as site:
        for order in (run.replicate, run.prepare):
            with pytest.raises(SplitBrain, match="nas1"):
                order(site, "projects")
        for wish in (Wish(), Wish(planned=True)):
            with pytest.raises((SplitBrain, PrimaryAlive)):
                driver.failover(site, "projects", wish)


def test_I2_C11_a_primary_that_its_peer_still_sees_is_not_taken_for_dead(pair: Pair) -> None:
    pair.cut_off = pair.seen_by_peer = {"nas1"}
    with pair.site() as site, pytest.raises(PrimaryAlive, match="the node is not gone"):
        driver.failover(site, "projects", Wish())
    assert changing(pair) == []
    assert fences(pair) == 0


def test_wrong_use_changes_nothing(pair: Pair) -> None:
    with pair.site() as site:
        with pytest.raises(NoSuchVolume):
            driver.failover(site, "nothing", Wish())
        with pytest.raises(PrimaryAlive, match="answers"):
            driver.failover(site, "projects", Wish())
        pair.nas1.dead = True
        with pytest.raises(NodeUnreachable):
            driver.failover(site, "projects", Wish(planned=True))
        with site.alone(site.catalog.volume("projects").id), pytest.raises(FailoverBusy):
            driver.failover(site, "projects", Wish())
        assert driver.failover(site, "projects", Wish(), decide=lambda _: False) is None
        pair.fence = ""
    with pair.site() as site, pytest.raises(FenceMissing):
        driver.failover(site, "projects", Wish())
    assert changing(pair) == []
    assert fences(pair) == 0


def test_a_dry_run_says_the_steps_and_changes_nothing(pair: Pair) -> None:
    break_off(pair)
    with pair.site() as site:
        made, first = driver.preview(site, "projects", Wish())
        assert first is Step.FENCE
        assert [made.sentence(step) for step in made.steps][2] == "nas2 becomes primary at epoch 2"
        assert not site.catalog.failover_open(made.volume)
    assert changing(pair) == []
    assert fences(pair) == 0


def test_I5_an_address_that_somebody_else_answers_for_is_not_served_at_until_he_does_not(pair: Pair) -> None:
    pair.cut_off, pair.strangers = {"nas1"}, {ADDRESS}
    with pair.site() as site:
        with pytest.raises(AddressTaken):
            driver.failover(site, "projects", Wish())
        assert pair.nas2.said(m.ServeVolume) == []
        pair.strangers.clear()
        driver.failover(site, "projects", Wish())
    assert_taken_over(pair)


def test_E1_a_primary_whose_disk_failed_answers_and_can_be_given_up(pair: Pair) -> None:
    break_off(pair)
    pair.nas1.dead = False

    def fail(_: m.ListVolumes) -> m.Volumes:
        raise DeviceFailed("volume.list failed on a disk of this node")

    pair.nas1.handlers[m.ListVolumes] = fail
    with pair.site() as site, pytest.raises(PrimaryAlive):
        driver.failover(site, "projects", Wish())
    pair.address["nas1"] = ""  # as the fence leaves it
    fail_over(pair, Wish(declare_dead=True))
    assert_taken_over(pair)


def test_I15_a_node_that_comes_and_goes_is_never_given_the_volume_back_by_itself(pair: Pair) -> None:
    break_off(pair)
    fail_over(pair)
    for _ in range(5):
        pair.nas1.dead = not pair.nas1.dead
        with pair.site() as site, pytest.raises((PrimaryAlive, NodeUnreachable), match=r"nas2 answers|nas1 cannot be reached"):
            driver.failover(site, "projects", Wish())
    assert_taken_over(pair)


def test_C9_the_agents_roles_are_the_truth_and_the_catalog_follows(pair: Pair) -> None:
    pair.role, pair.epoch = {"nas1": m.Role.SECONDARY, "nas2": m.Role.PRIMARY}, {"nas1": 2, "nas2": 2}
    with pair.site() as site:
        made, _ = driver.preview(site, "projects", Wish(planned=True))
        assert (made.source, made.target, made.epoch) == ("nas2", "nas1", 3)
        assert site.catalog.volume("projects").primary == "nas1", "a dry run writes nothing"
        driver.failover(site, "projects", Wish(planned=True))
        assert site.catalog.volume("projects").epoch == 3


def test_the_account_is_one_document(pair: Pair) -> None:
    from mgmt.failover.view import account_document, account_sheets

    break_off(pair)
    done = fail_over(pair)
    document = json.loads(json.dumps(account_document(done)))
    assert document["rto_s"] == pytest.approx(sum(document["seconds"].values()))
    assert document["rpo_s"] == document["lost"]["volume"]
    assert len(account_sheets(done)) == 2
