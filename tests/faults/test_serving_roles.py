"""Roles and epochs between two agents: promoted, overtaken, demoted, and brought up to the other again."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from agent.contract import messages as m
from agent.contract.errors import EpochStale, NoSuchGeneration, NotPrimary, RequestRefused, StaleTerm, TransferBusy
from agent.contract.identity import FilesystemKind, GenerationKind
from tests.faults.case import served
from tests.faults.phases import promote_and_serve
from tests.faults.rig import MIB, NodeProcess, Pair
from tests.faults.test_review_verbs import SIZE, instruction, interrupted

KINDS = [FilesystemKind.EXT4, FilesystemKind.XFS]
VERIFY = m.Differential.VERIFY


def reversed_pair(pair: Pair) -> Pair:
    return Pair(pair.nas2, pair.nas1, pair.authority)


def kinds(node: NodeProcess, volume: object) -> list[str]:
    return [facts.kind.value for facts in served(node, volume).generations]  # type: ignore[arg-type]


def test_orders_of_another_epoch_or_to_a_secondary_are_refused_and_change_nothing(pair: Pair) -> None:
    volume = pair.create("v", FilesystemKind.EXT4, SIZE[FilesystemKind.EXT4])
    with pytest.raises(NoSuchGeneration):
        pair.nas2.ask(m.PromoteVolume(volume, 2))
    pair.replicate(volume)
    before = served(pair.nas1, volume), served(pair.nas2, volume)
    for node, order, refusal in (
        (pair.nas2, m.ServeVolume(volume, 1), NotPrimary),
        (pair.nas2, m.PromoteVolume(volume, 1), EpochStale),
        (pair.nas2, m.PromoteVolume(volume, 3), EpochStale),
        (pair.nas2, m.DemoteVolume(volume, 0), EpochStale),
        (pair.nas1, m.PromoteVolume(volume, 2), EpochStale),
        (pair.nas1, m.ServeVolume(volume, 2), EpochStale),
        (pair.nas1, m.DemoteVolume(volume, 1), EpochStale),
    ):
        with pytest.raises(refusal):
            node.ask(order)
    assert (served(pair.nas1, volume), served(pair.nas2, volume)) == before
    assert before[0].confirmed
    assert not before[1].confirmed


def test_a_promotion_waits_for_a_reception(pair: Pair) -> None:
    volume = pair.create("v", FilesystemKind.EXT4, SIZE[FilesystemKind.EXT4])
    base = pair.replicate(volume)
    target = pair.take(volume)
    passes = pair.authority.passes("nas1", "nas2")
    transfer = pair.build(base, target)
    pair.nas2.ask(m.ReceiveTransfer(transfer, base, target, VERIFY, 1, passes.token, passes.receiver))
    with pytest.raises(TransferBusy):
        pair.nas2.ask(m.PromoteVolume(volume, 2))
    assert served(pair.nas2, volume).role is m.Role.SECONDARY


@pytest.mark.parametrize("quiesce", [False, True], ids=["stopped", "quiesced"])
@pytest.mark.parametrize("kind", KINDS)
def test_I18_a_primary_that_holds_nothing_more_keeps_nothing_when_it_is_demoted(pair: Pair, kind: FilesystemKind, quiesce: bool) -> None:
    volume = pair.create("v", kind, SIZE[kind])
    root = Path(served(pair.nas1, volume).mount_point)
    base = pair.replicate(volume)
    (root / "last").write_bytes(b"x" * 10_000)
    facts = pair.nas1.ask(m.StopServing(volume, quiesce))
    assert facts.serving is quiesce
    if quiesce:
        with pytest.raises(OSError, match="Read-only"):
            (root / "later").write_bytes(b"")
    last = pair.replicate(volume, base)
    assert pair.nas1.ask(m.DemoteVolume(volume, 2)) == m.Demoted(None)
    assert pair.nas1.ask(m.DemoteVolume(volume, 2)) == m.Demoted(None)
    root = Path(promote_and_serve(pair.nas2, volume).mount_point)
    assert (root / "last").read_bytes() == b"x" * 10_000
    assert served(pair.nas1, volume).generations[-1].id == last


@pytest.mark.parametrize("kind", KINDS)
def test_I11_I13_what_an_overtaken_primary_held_is_kept_and_only_what_differs_comes_back(pair: Pair, kind: FilesystemKind) -> None:
    volume = pair.create("v", kind, SIZE[kind])
    root = Path(served(pair.nas1, volume).mount_point)
    (root / "old").write_bytes(os.urandom(8 * MIB))
    base = pair.replicate(volume)
    (root / "unsent").write_bytes(b"only here" * 1000)
    pair.take(volume)
    pair.take(volume)
    unsent = pair.take(volume)  # a counter beyond those that the other will use
    pair.build(base, unsent)
    other = Path(promote_and_serve(pair.nas2, volume).mount_point)
    (other / "new").write_bytes(b"epoch two" * 1000)
    assert not (other / "unsent").exists()

    kept = pair.nas1.ask(m.DemoteVolume(volume, 2)).kept
    assert kept.kind is GenerationKind.KEPT
    assert not served(pair.nas1, volume).serving
    with pytest.raises(NotPrimary):
        pair.nas1.ask(m.ServeVolume(volume, 1))

    back = reversed_pair(pair)
    target = back.take(volume)
    assert target.counter < unsent.counter
    transfer = back.build(base, target)
    sent = back.receive_and_send(transfer, base, target, VERIFY)
    assert sent.bytes_sent < 4 * MIB, "a differential, not a full copy"
    held = served(pair.nas1, volume).generations
    assert (m.newest(held).id, held[-1].id) == (target, target)
    assert kept in held
    assert unsent not in {facts.id for facts in held}, "what was overtaken goes with the next commit; what was kept has it"
    opened = Path(pair.nas1.ask(m.OpenGeneration(kept.id)).path)
    assert (opened / "unsent").read_bytes() == b"only here" * 1000
    pair.nas1.ask(m.CloseGeneration(kept.id))

    assert pair.nas2.ask(m.DemoteVolume(volume, 3)).kept is not None, "mounted for writing since it was sent"
    root = Path(promote_and_serve(pair.nas1, volume, 3).mount_point)
    assert (root / "new").read_bytes() == b"epoch two" * 1000
    assert not (root / "unsent").exists()


def test_A13_F2_a_transfer_of_an_overtaken_primary_is_refused(pair: Pair) -> None:
    """NAS 1 slept through a promotion and a return: what it then sends is of an epoch that has ended."""
    volume = pair.create("v", FilesystemKind.EXT4, SIZE[FilesystemKind.EXT4])
    base = pair.replicate(volume)
    late = pair.take(volume)
    transfer = pair.build(base, late)
    pair.nas2.ask(m.PromoteVolume(volume, 2))
    pair.nas2.ask(m.DemoteVolume(volume, 3))
    with pytest.raises(EpochStale):
        pair.receive_and_send(transfer, base, late, VERIFY)
    assert late not in {facts.id for facts in served(pair.nas2, volume).generations}


def test_I12_an_interrupted_way_back_is_salvaged_like_any_other(pair: Pair) -> None:
    """The roles are swapped: NAS 2 is the source and dies, NAS 1 salvages, with what it was overtaken in beside the line."""
    transfer, base, _ = interrupted(pair)
    pair.nas2.ask(instruction(pair, transfer))
    other = Path(promote_and_serve(pair.nas2, base.volume).mount_point)
    assert pair.nas1.ask(m.DemoteVolume(base.volume, 2)).kept is not None
    (other / "after").write_bytes(os.urandom(200_000))
    back = reversed_pair(pair)
    target = back.take(base.volume)
    return_transfer = back.build(base, target)
    pair.nas1.kill()
    pair.nas1.start_armed("dst.before_commit=kill:1")
    with pytest.raises(Exception):  # noqa: B017, PT011 - the receiver dies: the sender's word for it depends on the moment
        back.receive_and_send(return_transfer, base, target, VERIFY)
    pair.nas1.wait_dead()
    pair.nas1.start()
    salvaged = pair.nas1.ask(instruction(back, return_transfer))
    assert m.newest(served(pair.nas1, base.volume).generations) == salvaged.generation
    root = Path(promote_and_serve(pair.nas1, base.volume, 3).mount_point)
    assert (root / "after").stat().st_size == 200_000


def test_I2_a_node_says_whether_it_can_reach_the_other(pair: Pair) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        assert not pair.nas2.ask(m.ProbePeer("127.0.0.1", port)).reachable
        listening.listen()
        assert pair.nas2.ask(m.ProbePeer("127.0.0.1", port)) == m.Probed(True, "")
    assert "ECONNREFUSED" in pair.nas2.ask(m.ProbePeer("127.0.0.1", port)).reason
    for address, port, limit_s in (("nas1", 22, 1.0), ("127.0.0.1", 0, 1.0), ("127.0.0.1", 22, 1e9)):
        with pytest.raises(RequestRefused):
            pair.nas2.ask(m.ProbePeer(address, port, limit_s))


def test_C8_C9_a_management_node_of_a_lower_term_may_look_and_nothing_else(pair: Pair) -> None:
    """The second of two, or one whose catalog was restored from an old copy; the agent remembers across a restart."""
    volume = pair.create("v", FilesystemKind.EXT4, SIZE[FilesystemKind.EXT4])
    pair.nas1.term = 5
    assert pair.nas1.ask(m.Hello()).term == 5, "taking over is heard at once"
    for _ in range(2):
        pair.nas1.term = 4
        with pytest.raises(StaleTerm):
            pair.nas1.ask(m.StopServing(volume))
        assert served(pair.nas1, volume).serving
        pair.nas1.kill()
        pair.nas1.start()
    pair.nas1.term = 5
    assert not pair.nas1.ask(m.StopServing(volume)).serving
