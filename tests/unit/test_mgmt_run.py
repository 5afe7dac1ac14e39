"""The operations against two scripted agents: what is asked of whom, in which order, and what is remembered."""

from __future__ import annotations

import dataclasses
import json
import traceback
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from agent.contract import messages as m
from agent.contract.errors import (
    LayoutUnsupported,
    LinkLost,
    NameRefused,
    NodeUnreachable,
    NoSuchTransfer,
    NotificationUnhandled,
    NotPrimary,
    PeerRefused,
    PrimaryAlive,
    TransferBusy,
    VolumeExists,
)
from agent.contract.identity import FilesystemKind, empty_generation
from mgmt import run
from mgmt.catalog import Catalog
from mgmt.determination import AtomicSet, Policy
from mgmt.report import LossStatement
from mgmt.run import replication
from mgmt.run.site import HELLO_LIMIT_S, next_term
from mgmt.view import to_json
from tests.unit.mgmt_pair import Pair, S, die, lose


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    monkeypatch.setattr(replication, "FIRST_PAUSE_S", 0.001)
    return Pair(tmp_path)


def verbs(asked: list[object]) -> list[str]:
    return [m.VERB_OF[type(arguments)] for arguments in asked]


def test_the_first_replication_starts_from_the_empty_generation_and_the_next_from_the_last(pair: Pair) -> None:
    with pair.site() as site:
        pair.with_volume(site)
        first = run.replicate(site, "projects")
        assert pair.volume
        assert first.base == empty_generation(pair.volume.volume)
        second = run.replicate(site, "projects", differential=m.Differential.SEND)
        assert second.base == first.target
        assert not second.resumed
        sent = pair.nas1.said(m.SendTransfer)[-1]
        received = pair.nas2.said(m.ReceiveTransfer)[-1]
        assert sent.differential is received.differential is m.Differential.SEND
        assert sent.token == received.token
        assert sent.tls.key_pem != received.tls.key_pem


def test_A_a_proxy_may_stand_between(pair: Pair) -> None:
    with pair.site() as site:
        pair.with_volume(site)
        run.replicate(site, "projects", route=lambda address, port: (f"via-{address}", port + 1), streams=7, rate_limit_bytes_s=99)
        sent = pair.nas1.said(m.SendTransfer)[0]
        assert (sent.address, sent.port, sent.streams, sent.rate_limit_bytes_s) == ("via-192.0.2.12", 7001, 7, 99)


def test_what_was_prepared_is_sent_by_the_next_order_and_nothing_before(pair: Pair) -> None:
    with pair.site() as site:
        pair.with_volume(site)
        ready = run.prepare(site, "projects")
        assert ready.built
        assert (ready.resumed, ready.frozen_ms) == (False, 1.5)
        assert pair.nas1.said(m.SendTransfer) == []
        assert pair.nas2.said(m.ReceiveTransfer) == []
        again = run.prepare(site, "projects")
        assert (again.transfer, again.target, again.resumed, again.built) == (ready.transfer, ready.target, True, None)
        done = run.replicate(site, "projects")
        assert (done.transfer, done.target, done.resumed, done.built) == (ready.transfer, ready.target, True, None)
        assert len(pair.nas1.said(m.TakeGeneration)) == len(pair.nas1.said(m.BuildTransfer)) == 1
        assert run.prepare(site, "projects").base == ready.target


def test_what_was_prepared_can_be_given_up(pair: Pair) -> None:
    with pair.site() as site:
        pair.with_volume(site)
        ready = run.prepare(site, "projects")
        assert run.discard(site, "projects") == [(ready.transfer, "nas1")]
        assert run.replicate(site, "projects").transfer != ready.transfer


def test_a_differential_that_cannot_be_prepared_leaves_no_generation(pair: Pair) -> None:
    def refuse(_: m.BuildTransfer) -> m.Built:
        raise LayoutUnsupported("as the script says")

    pair.nas1.handlers[m.BuildTransfer] = refuse
    with pair.site() as site:
        pair.with_volume(site)
        with pytest.raises(LayoutUnsupported):
            run.prepare(site, "projects")
        assert pair.generations["nas1"] == []


def test_D_a_link_that_breaks_is_resumed_with_new_passes_and_the_same_transfer(pair: Pair) -> None:
    pair.fails = [lose(LinkLost), lose(LinkLost), None]
    with pair.site() as site:
        pair.with_volume(site)
        told: list[str] = []
        done = run.replicate(site, "projects", tell=lambda node, progress: told.append(f"{node} {progress.step}"))
        assert done.sessions == 3
        sends = pair.nas1.said(m.SendTransfer)
        assert len({sent.transfer for sent in sends}) == 1
        assert len({sent.token for sent in sends}) == 3
        assert "nas2 waiting to resume: link-lost" in told
        assert len(pair.nas1.said(m.BuildTransfer)) == 1


def test_D_resuming_is_bounded_and_the_next_order_goes_on(pair: Pair) -> None:
    pair.fails = [lose(LinkLost), lose(LinkLost)]
    with pair.site() as site:
        pair.with_volume(site)
        with pytest.raises(LinkLost):
            run.replicate(site, "projects", attempts=2)
        done = run.replicate(site, "projects")
        assert done.resumed
        assert len(pair.nas1.said(m.TakeGeneration)) == 1
        assert run.standing(site, "projects").pending == ()
        assert len(site.catalog.notifications()) == 2


def test_a_secondary_that_still_waits_for_the_session_before_is_waited_for(pair: Pair) -> None:
    receive, busy = pair.nas2.handlers[m.ReceiveTransfer], [False, True, True, False]

    def listen(asked: m.ReceiveTransfer) -> m.Listening:
        if busy.pop(0):
            raise TransferBusy("it still listens")
        found: m.Listening = receive(asked)
        return found

    pair.nas2.handlers[m.ReceiveTransfer] = listen
    pair.fails = [lose(LinkLost), None]
    with pair.site() as site:
        pair.with_volume(site)
        assert run.replicate(site, "projects", attempts=2).sessions == 2


def test_K5_a_second_order_is_told_that_the_volume_is_busy(pair: Pair) -> None:
    with pair.site() as site:
        pair.with_volume(site)
        first = run.replicate(site, "projects")
        running = pair.transfer(UUID(int=9), first.base, first.target, sending=True, state=S.RUNNING)
        pair.transfers["nas1"][running.id] = running
        with pytest.raises(TransferBusy, match="is sending"):
            run.replicate(site, "projects")
        assert len(pair.nas1.said(m.TakeGeneration)) == 1


def test_an_error_whose_class_forbids_it_is_not_retried(pair: Pair) -> None:
    pair.fails = [lose(PeerRefused)]
    with pair.site() as site:
        pair.with_volume(site)
        with pytest.raises(PeerRefused):
            run.replicate(site, "projects")
        assert len(pair.nas1.said(m.SendTransfer)) == 1


def test_a_primary_that_dies_is_not_asked_again(pair: Pair) -> None:
    pair.fails = [die()]
    with pair.site() as site:
        pair.with_volume(site)
        with pytest.raises(NodeUnreachable):
            run.replicate(site, "projects")
        assert len(pair.nas1.said(m.SendTransfer)) == 1
        (listed,) = pair.nas2.said(m.ReceiveTransfer)
        recorded = site.catalog.transfer(listed.transfer)
        assert recorded
        assert recorded.ending == "primary-lost"


def test_a_part_that_the_primary_cannot_go_on_with_is_named_before_anything_is_done(pair: Pair) -> None:
    pair.fails = [lose(LinkLost)]
    with pair.site() as site:
        pair.with_volume(site)
        with pytest.raises(LinkLost):
            run.replicate(site, "projects", attempts=1)
        pair.transfers["nas1"].clear()
        with pytest.raises(TransferBusy, match="landfall discard projects"):
            run.replicate(site, "projects")
        assert len(pair.nas1.said(m.TakeGeneration)) == 1
        run.discard(site, "projects")
        assert not run.replicate(site, "projects").resumed


def test_a_transfer_that_was_overtaken_is_forgotten(pair: Pair) -> None:
    with pair.site() as site:
        pair.with_volume(site)
        first = run.replicate(site, "projects")
        old = pair.transfer(UUID(int=9), first.base, first.target, sending=True, state=S.WAITING)
        pair.transfers["nas1"][old.id] = old
        run.replicate(site, "projects")
        assert old.id not in pair.transfers["nas1"]


def test_each_node_keeps_the_newest_generations_and_the_empty_one(pair: Pair) -> None:
    with pair.site() as site:
        pair.with_volume(site)
        for _ in range(6):
            run.replicate(site, "projects")
        assert [facts.id.counter for facts in pair.generations["nas1"]] == [4, 5, 6]
        assert [facts.id.counter for facts in pair.generations["nas2"]] == [0, 4, 5, 6]
        assert run.replicate(site, "projects").base.counter == 6


def test_nothing_recorded_yet_is_a_record_of_nothing(pair: Pair) -> None:
    pair.nas2.handlers[m.FetchArrival] = lambda _: b""
    with pair.site() as site:
        failed(pair, site)
        assert [row.paths for row in run.verdicts(site, "projects").statement.accounts if row.outcome is m.Outcome.RECOVERED] == [
            ("inline",)
        ]


def test_J13_neither_keys_nor_tokens_are_shown(pair: Pair, capfd: pytest.CaptureFixture[str]) -> None:
    pair.fails = [lose(LinkLost)]
    with pair.site() as site:
        pair.with_volume(site)
        with pytest.raises(LinkLost) as caught:
            run.replicate(site, "projects", attempts=1)
        asked = [*pair.nas1.said(m.SendTransfer), *pair.nas2.said(m.ReceiveTransfer)]
        shown = "".join(map(repr, asked)) + "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr())
        assert len(asked) == 2
        for order in asked:
            assert order.token not in shown
            assert order.tls.key_pem not in shown
            assert "PRIVATE KEY" not in shown
    kept = b"".join(path.read_bytes() for path in pair.folder.rglob("catalog*"))
    assert all(order.token.encode() not in kept for order in asked)


def failed(pair: Pair, site: run.Site) -> None:
    pair.fails = [die()]
    pair.with_volume(site)
    with pytest.raises(NodeUnreachable):
        run.replicate(site, "projects")


def test_the_salvage_follows_the_order_of_the_claim(pair: Pair) -> None:
    with pair.site() as site:
        failed(pair, site)
        pair.nas2.asked.clear()
        shown: list[str] = []

        def agree(made: LossStatement) -> bool:
            shown.append(to_json(made))
            return True

        statement = run.salvage_volume(site, "projects", decide=agree)
        assert statement
        order = verbs(pair.nas2.asked)
        steps = ["outbox.read", "outbox.acknowledge", "transfer.dmi", "transfer.arrival", "salvage.update"]
        assert [order.index(step) for step in steps] == sorted(order.index(step) for step in steps)
        (instruction,) = pair.nas2.said(m.UpdateInstruction)
        assert instruction.files == (0, 3)
        assert not instruction.complete
        assert instruction.deletions is m.Deletions.HOLD
        assert [(account.paths[0], account.outcome) for account in statement.accounts] == [
            ("whole", m.Outcome.RECOVERED),
            ("half", m.Outcome.KEPT),
            ("new", m.Outcome.ABSENT),
            ("inline", m.Outcome.RECOVERED),
            ("gone", m.Outcome.HELD),
        ]
        assert statement.generation
        assert json.loads(shown[0])["generation"] is None
        folder = site.evidence_folder(instruction.transfer)
        assert (folder / "dmi").stat().st_size > 0
        assert (folder / "arrival").stat().st_size > 0
        assert site.catalog.newest_salvage(statement.volume).statement == statement
        assert site.catalog.notifications(pending_only=True) == []


def test_policy_goes_into_the_instruction(pair: Pair) -> None:
    with pair.site() as site:
        failed(pair, site)
        run.set_volume(site, "projects", policy=Policy(m.Deletions.APPLY, (AtomicSet("pair", ("whole", "half")),)))
        statement = run.salvage_volume(site, "projects")
        assert statement
        assert pair.nas2.said(m.UpdateInstruction)[0].files == (3,)
        assert statement.files.deleted == 1


def test_a_dry_run_changes_nothing(pair: Pair) -> None:
    with pair.site() as site:
        failed(pair, site)
        found = run.verdicts(site, "projects")
        assert found.statement.files.recovered == 2
        assert run.salvage_volume(site, "projects", decide=lambda _: False) is None
        assert pair.nas2.said(m.UpdateInstruction) == []


def test_I2_a_living_primary_is_not_salvaged_from_unless_declared_dead(pair: Pair) -> None:
    pair.fails = [lose(PeerRefused)]
    with pair.site() as site:
        pair.with_volume(site)
        with pytest.raises(PeerRefused):
            run.replicate(site, "projects")
        with pytest.raises(PrimaryAlive):
            run.salvage_volume(site, "projects")
        assert run.salvage_volume(site, "projects", declare_dead=True)


def test_undo_makes_the_transfer_resumable(pair: Pair) -> None:
    with pair.site() as site:
        failed(pair, site)
        assert run.salvage_volume(site, "projects")
        with pytest.raises(NoSuchTransfer, match="already"):
            run.salvage_volume(site, "projects")
        pair.nas1.dead = False
        with pytest.raises(TransferBusy):
            run.replicate(site, "projects")
        run.undo(site, "projects")
        assert run.replicate(site, "projects").resumed
        assert site.catalog.salvages(site.catalog.volume("projects").id)[0].undone_ns


def test_E23_a_disk_that_became_read_only_stands_in_the_status_for_as_long_as_it_is_so(pair: Pair) -> None:
    trouble = "/dev/sdb, below the volumes, became read-only at 2026-11-23 04:30:00 UTC"
    with pair.site() as site:
        pair.with_volume(site)
        sound, volume = pair.nas2.handlers[m.ListVolumes], site.catalog.volume("projects").id
        pair.nas2.handlers[m.ListVolumes] = lambda _: m.Volumes(pair.facts("nas2"), (), (trouble,))
        pair.outbox.append(m.Notification(1, "device-changed", volume, None, 1, trouble))
        standing = run.standing(site, "projects")
        assert f"nas2: {trouble}" in standing.sentence
        assert [seen.notification.message for seen in standing.pending] == [trouble]
        pair.nas2.handlers[m.ListVolumes] = sound
        standing = run.standing(site, "projects")
        assert trouble not in standing.sentence
        assert standing.pending == ()


def test_C3_a_notification_waits_for_a_management_node_that_was_away(pair: Pair) -> None:
    with pair.site() as site:
        failed(pair, site)
    with pair.site() as site:
        standing = run.standing(site, "projects")
        assert [seen.notification.kind for seen in standing.pending] == ["reception-failure"]
        assert pair.outbox == []
        assert standing.primary.facts is None
        assert "2 of 4 changed files" in standing.sentence
        assert run.collect(site).unreachable == ("nas1",)


def test_a_receiver_that_has_not_noticed_yet_is_given_its_time(pair: Pair) -> None:
    pair.notify_on_loss = False
    with pair.site() as site:
        failed(pair, site)
        transfer = next(iter(pair.transfers["nas2"]))

        def notice(asked: m.ReadOutbox) -> m.Outbox:
            if asked.wait_s > 0 and not pair.outbox:
                pair.transfers["nas2"][transfer] = dataclasses.replace(pair.transfers["nas2"][transfer], state=S.INTERRUPTED)
                pair.notify(transfer)
            return m.Outbox(tuple(pair.outbox))

        pair.nas2.handlers[m.ReadOutbox] = notice
        assert run.salvage_volume(site, "projects")


def test_waiting_for_a_notification_ends(pair: Pair) -> None:
    pair.notify_on_loss = False
    with pair.site() as site:
        failed(pair, site)
        with pytest.raises(NotificationUnhandled):
            run.wait_for_failure(site, "nas2", next(iter(pair.transfers["nas2"])), 0.05)


def test_discard_tells_both_nodes(pair: Pair) -> None:
    pair.fails = [lose(PeerRefused)]
    with pair.site() as site:
        pair.with_volume(site)
        with pytest.raises(PeerRefused):
            run.replicate(site, "projects")
        assert [node for _, node in run.discard(site, "projects")] == ["nas2", "nas1"]
        with pytest.raises(NoSuchTransfer):
            run.discard(site, "projects")
        assert not run.standing(site, "projects").open_transfers


def test_a_mend_that_was_left_behind_is_discarded_though_its_target_is_on_both_nodes(pair: Pair) -> None:
    with pair.site() as site:
        pair.with_volume(site)
        done = run.replicate(site, "projects")
        left = pair.transfer(uuid4(), done.base, done.target, sending=True, state=S.WAITING)
        pair.transfers["nas1"][left.id] = left
        with pytest.raises(NoSuchTransfer):
            run.discard(site, "projects")
        pair.transfers["nas1"][left.id] = dataclasses.replace(left, mends=True)
        assert run.discard(site, "projects") == [(left.id, "nas1")]


def test_C1_adding_a_volume_can_be_finished_by_doing_it_again(pair: Pair) -> None:
    def unreachable(_: m.AdmitReplica) -> m.VolumeFacts:
        raise EOFError

    admit = pair.nas2.handlers[m.AdmitReplica]
    pair.nas2.handlers[m.AdmitReplica] = unreachable
    with pair.site() as site:
        with pytest.raises(NodeUnreachable):
            pair.with_volume(site)
        pair.nas2.dead, pair.nas2.handlers[m.AdmitReplica] = False, admit
        pair.with_volume(site)
        with pytest.raises(VolumeExists):
            pair.with_volume(site)
        with pytest.raises(VolumeExists):  # to a client of SMB it is the same share
            run.add_volume(site, "PROJECTS", filesystem=FilesystemKind.XFS, size_bytes=1 << 30, primary="nas1", secondary="nas2")
        assert len(pair.nas1.said(m.CreateVolume)) == 1


class GoneError(BaseException):
    """The management node dies."""


def test_C2_what_was_ordered_of_the_source_alone_is_gone_on_with(pair: Pair) -> None:
    def die(transfer: UUID, built: m.Built | None) -> None:
        raise GoneError

    with pair.site() as site:
        pair.with_volume(site)
        with pytest.raises(GoneError):
            run.replicate(site, "projects", on_order=die)
    assert pair.nas2.said(m.ReceiveTransfer) == []
    with pair.site() as site:
        done = run.replicate(site, "projects")
    assert done.resumed
    assert len(pair.nas1.said(m.TakeGeneration)) == 1, "nothing is left behind of the first order"
    assert done.transfer == pair.nas1.said(m.BuildTransfer)[0].transfer


def test_C4_what_the_agents_committed_and_nobody_recorded_is_not_sent_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(self: Catalog, transfer: UUID, ending: str, at_ns: int) -> None:
        raise GoneError

    with pair.site() as site, monkeypatch.context() as dying:
        pair.with_volume(site)
        dying.setattr(Catalog, "end_transfer", die)
        with pytest.raises(GoneError):
            run.replicate(site, "projects")
    committed = pair.generations["nas2"][-1].id
    with pair.site() as site:
        standing = run.standing(site, "projects")
        assert not standing.open_transfers
        assert standing.secondary.facts
        assert m.newest(standing.secondary.facts.generations).id == committed
        done = run.replicate(site, "projects")
    assert done.base == committed, "the next differential begins where the agents stand"
    assert len(pair.nas1.said(m.SendTransfer)) == 2


def test_a_layout_that_is_refused_leaves_no_volume(pair: Pair) -> None:
    def refuse(_: m.CreateVolume) -> m.VolumeFacts:
        raise LayoutUnsupported("external log")

    pair.nas1.handlers[m.CreateVolume] = refuse
    with pair.site() as site:
        with pytest.raises(LayoutUnsupported):
            pair.with_volume(site)
        assert run.list_volumes(site) == []


def test_I7_only_the_primary_serves_and_serving_promotes_nobody(pair: Pair) -> None:
    with pair.site() as site:
        pair.with_volume(site)
        run.unserve(site, "projects")
        with pytest.raises(NotPrimary):
            run.serve(site, "projects", node="nas2")
        assert run.serve(site, "projects").serving
        assert pair.nas2.said(m.ServeVolume) == pair.nas2.said(m.PromoteVolume) == []


def test_I3_nobody_is_let_serve_while_the_peer_cannot_say_that_it_was_not_promoted(pair: Pair) -> None:
    with pair.site() as site:
        pair.with_volume(site)
        run.unserve(site, "projects")
    pair.nas2.dead = True
    with pair.site() as site:
        with pytest.raises(NodeUnreachable, match="nobody can say"):
            run.serve(site, "projects")
        assert not pair.serving["nas1"]
        assert run.serve(site, "projects", without_peer=True).serving, "an operator may know"


def test_I3_a_node_that_was_overtaken_while_it_was_away_is_not_served_from(pair: Pair) -> None:
    with pair.site() as site:
        pair.with_volume(site)
        run.set_volume(site, "projects", primary="nas2", secondary="nas1", epoch=2)
        pair.nas2.dead = True
        with pytest.raises(NotPrimary, match="epoch 2"):
            run.serve(site, "projects", node="nas1")
        assert pair.nas1.said(m.ServeVolume) == []


def test_C8_C9_taking_over_goes_above_every_agent_and_tells_them(pair: Pair) -> None:
    with pair.site() as site:
        run.add_volume(site, "projects", filesystem=FilesystemKind.XFS, size_bytes=1 << 30, primary="nas1", secondary="nas2")
        assert (pair.nas1.term, pair.nas2.term) == (1, 1)
        pair.nas2.term = 7  # somebody took over while we were away
        term = site.take_over()
        assert term > 7
        assert (pair.nas1.term, pair.nas2.term) == (term, term)
    pair.nas1.dead = pair.nas2.dead = True
    with pair.site() as site:
        with pytest.raises(NodeUnreachable):
            site.take_over()
        assert site.catalog.term == term


def test_C8_two_that_take_over_from_the_same_term_are_not_in_charge_together() -> None:
    drawn = iter((17, 4711))
    one, other = (next_term(7, lambda most: next(drawn)) for _ in range(2))
    assert 7 < one < other < next_term(one, lambda most: 0)


def test_J10_names_that_are_not_plain_are_refused_before_anybody_is_asked(pair: Pair) -> None:
    with pair.site() as site:
        for name in ("x; rm -rf /", "$(id)", "--force", "-h", "a b", "a'b", "a\nb", "", "..", "é", "global", "Homes", "printers"):
            with pytest.raises(NameRefused):
                run.add_volume(site, name, filesystem=FilesystemKind.XFS, size_bytes=1, primary="nas1", secondary="nas2")
        assert pair.nas1.asked == []


def test_a_site_with_slow_nodes_waits_longer_for_their_greeting(pair: Pair) -> None:
    waited: list[float] = []

    class Slow:
        def ask(self, arguments: object, tell: object = None, *, limit_s: float = 0.0) -> object:
            waited.append(limit_s)
            raise NodeUnreachable("as the script says")

        def close(self) -> None: ...

    with pair.site() as site:
        for limit in (5.0, 60.0):
            site.inventory = dataclasses.replace(site.inventory, connect_limit_s=limit)
            site._nodes["nas1"] = Slow()  # type: ignore[assignment]
            assert not site.alive("nas1")
    assert waited == [HELLO_LIMIT_S, 60.0]
