"""Two scripted agents that keep just enough state to replicate, fail, resume and salvage one volume."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import numpy as np

from agent.contract import arrival as arrivals
from agent.contract import columns
from agent.contract import messages as m
from agent.contract.dmi import Change, Dmi
from agent.contract.errors import AddressTaken, DeviceBusy, EpochStale, LandfallError, NoSuchTransfer, NotPrimary
from agent.contract.identity import FilesystemKind, GenerationId, GenerationKind, empty_generation
from mgmt.inventory import FenceOptions, Inventory, NodeEntry
from mgmt.run import Site
from tests.unit.mgmt_dmis import HEAD, File, make
from tests.unit.mgmt_fakes import FakeAgent

S = m.TransferState
FILES = [
    File((b"whole",), needs=(0,), size=10),
    File((b"half",), needs=(0, 1), size=20),
    File((b"new",), Change.NEW | Change.CONTENT, needs=(2,), size=30),
    File((b"inline",), Change.NEW),
    File((b"gone",), Change.DELETED),
]
PIECES = 3


class Pair:
    """nas1 and nas2; either can be either. ``fails`` is what the next sends do: an error to answer, EOFError to die, None to succeed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.volume: m.CreateVolume | None = None
        self.admitted = False
        self.generations: dict[str, list[m.GenerationFacts]] = {"nas1": [], "nas2": []}
        self.transfers: dict[str, dict[UUID, m.TransferFacts]] = {"nas1": {}, "nas2": {}}
        self.fails: list[BaseException | None] = []
        self.bits = [3, 1, 0]
        self.outbox: list[m.Notification] = []
        self.notify_on_loss = True
        self.serving = {"nas1": True, "nas2": False}
        self.role = {"nas1": m.Role.PRIMARY, "nas2": m.Role.SECONDARY}
        self.epoch = {"nas1": 1, "nas2": 1}
        self.address: dict[str, str] = {"nas1": "", "nas2": ""}
        self.strangers: set[str] = set()  # addresses that another machine answers for
        self.unsent = False  # whether a primary that is demoted holds what the other lacks
        self.cut_off: set[str] = set()  # nodes that live, and that neither the management node nor its peer gets a connection to
        self.seen_by_peer: set[str] = set()  # of those, whom the peer does reach
        self.fence_options = FenceOptions()
        self.fence = ""
        self.nas1 = FakeAgent("nas1", self.both("nas1"))
        self.nas2 = FakeAgent("nas2", self.both("nas2"))
        self.agents = {"nas1": self.nas1, "nas2": self.nas2}

    def site(self) -> Site:
        """The management node; a second one has the same catalog."""
        entries = tuple(
            NodeEntry(name, f"{name}.invalid", self.folder / "key", "", fence=self.fence, fence_options=self.fence_options)
            for name in self.agents
        )
        inventory = Inventory(state_dir=self.folder / "state", node=entries, silence_limit_s=0.1, keep_generations=3)
        return Site(inventory, {name: agent.node for name, agent in self.agents.items()}, self.knock)

    def knock(self, address: str, port: int, limit_s: float) -> bool:
        """Whether the management node gets a connection."""
        name = address.removesuffix(".invalid")
        return not self.agents[name].dead and name not in self.cut_off

    def both(self, node: str) -> dict[type, Callable[..., object]]:
        """What an agent answers."""
        other = {"nas1": "nas2", "nas2": "nas1"}[node]

        def discard(asked: m.DiscardTransfer) -> m.Done:
            if self.transfers[node].pop(asked.transfer, None) is None:
                raise NoSuchTransfer("unknown")
            return m.Done()

        def drop(asked: m.DropGeneration) -> m.Done:
            if any(asked.generation in {facts.base, facts.target} for facts in self.transfers[node].values()):
                raise DeviceBusy("a transfer needs it")
            self.generations[node] = [facts for facts in self.generations[node] if facts.id != asked.generation]
            return m.Done()

        def promote(asked: m.PromoteVolume) -> m.VolumeFacts:
            if (self.role[node], self.epoch[node]) != (m.Role.PRIMARY, asked.epoch):
                if self.role[node] is m.Role.PRIMARY or asked.epoch != self.epoch[node] + 1:
                    raise EpochStale(f"{node} stands at {self.epoch[node]}")
                self.role[node], self.epoch[node] = m.Role.PRIMARY, asked.epoch
            return self.facts(node)[0]

        def demote(asked: m.DemoteVolume) -> m.Demoted:
            if asked.epoch < self.epoch[node] or (self.role[node] is m.Role.PRIMARY and asked.epoch == self.epoch[node]):
                raise EpochStale(f"{node} stands at {self.epoch[node]}")
            kept = None
            if self.role[node] is m.Role.PRIMARY and self.unsent:
                counter = max(facts.id.counter for facts in self.generations[node]) + 1
                number = GenerationId(self.facts(node)[0].id, self.epoch[node], counter, f"{counter:032x}")
                kept = m.GenerationFacts(number, GenerationKind.KEPT, counter)
                self.generations[node].append(kept)
            self.role[node], self.epoch[node], self.serving[node], self.address[node] = m.Role.SECONDARY, asked.epoch, False, ""
            last = self.generations[node][-1]
            return m.Demoted(kept or (last if last.kind is GenerationKind.KEPT else None))

        def serve(asked: m.ServeVolume) -> m.VolumeFacts:
            if self.role[node] is not m.Role.PRIMARY:
                raise NotPrimary(node)
            if asked.epoch != self.epoch[node]:
                raise EpochStale(f"{node} stands at {self.epoch[node]}")
            self.serving[node] = True
            return self.facts(node)[0]

        def stop(_: m.StopServing) -> m.VolumeFacts:
            self.serving[node] = False
            return self.facts(node)[0]

        def take_address(asked: m.TakeAddress) -> m.Done:
            if self.role[node] is not m.Role.PRIMARY:
                raise NotPrimary(node)
            sees = not self.agents[other].dead and (other not in self.cut_off or other in self.seen_by_peer)
            if (self.address[other] == asked.address and sees) or asked.address in self.strangers:
                raise AddressTaken("somebody answers for it")
            self.address[node] = asked.address
            return m.Done()

        def drop_address(_: m.DropAddress) -> m.Done:
            self.address[node] = ""
            return m.Done()

        def probe(_: m.ProbePeer) -> m.Probed:
            gone = self.agents[other].dead or (other in self.cut_off and other not in self.seen_by_peer)
            return m.Probed(not gone, "No route to host" if gone else "")

        def acknowledge(asked: m.AcknowledgeOutbox) -> m.Done:
            self.outbox = [said for said in self.outbox if said.sequence > asked.sequence]
            return m.Done()

        def receive(asked: m.ReceiveTransfer) -> m.Listening:
            assert asked.tls.peer == f"landfall://{other}/sender"
            self.transfers[node][asked.transfer] = self.transfer(asked.transfer, asked.base, asked.target, sending=False, state=S.WAITING)
            return m.Listening("192.0.2.12", 7000)

        def build(asked: m.BuildTransfer) -> list[object]:
            self.transfers[node][asked.transfer] = self.transfer(asked.transfer, asked.base, asked.target, sending=True, state=S.WAITING)
            return [m.Progress("compare", 1, 1), m.Built(PIECES, len(FILES), 3 * 4096, 100, "00" * 16)]

        return {
            m.CreateVolume: self.create,
            m.AdmitReplica: self.admit,
            m.ListVolumes: lambda _: m.Volumes(self.facts(node)),
            m.TakeGeneration: lambda asked: self.take(asked, node),
            m.BuildTransfer: build,
            m.SendTransfer: lambda asked: self.send(asked, node, other),
            m.ReceiveTransfer: receive,
            m.FetchDmi: lambda asked: b"".join(self.dmi(asked.transfer, node).encode()),
            m.FetchArrival: lambda asked: self.record(asked.transfer),
            m.UpdateInstruction: self.update,
            m.UndoSalvage: self.undo,
            m.ListTransfers: lambda _: m.Transfers(tuple(self.transfers[node].values())),
            m.DiscardTransfer: discard,
            m.DropGeneration: drop,
            m.PromoteVolume: promote,
            m.DemoteVolume: demote,
            m.ServeVolume: serve,
            m.StopServing: stop,
            m.TakeAddress: take_address,
            m.DropAddress: drop_address,
            m.ProbePeer: probe,
            m.ReadOutbox: lambda _: m.Outbox(tuple(self.outbox) if node == "nas2" else ()),
            m.AcknowledgeOutbox: acknowledge,
        }

    def facts(self, node: str) -> tuple[m.VolumeFacts, ...]:
        if self.volume is None or (node == "nas2" and not self.admitted):
            return ()
        volume = self.volume
        return (
            m.VolumeFacts(
                volume.volume,
                volume.name,
                volume.filesystem,
                volume.size_bytes,
                self.role[node],
                m.ReplicaState.UP_TO_DATE,
                self.epoch[node],
                self.serving[node],
                "",
                "",
                tuple(self.generations[node]),
                confirmed=self.serving[node],
            ),
        )

    def create(self, asked: m.CreateVolume) -> m.VolumeFacts:
        self.volume = asked
        return self.facts("nas1")[0]

    def admit(self, asked: m.AdmitReplica) -> m.VolumeFacts:
        self.admitted = True
        if not self.generations["nas2"]:
            self.generations["nas2"].append(m.GenerationFacts(empty_generation(asked.volume), GenerationKind.EMPTY, 0))
        return self.facts("nas2")[0]

    def take(self, asked: m.TakeGeneration, node: str) -> m.Taken:
        counter = max((facts.id.counter for facts in self.generations[node]), default=0) + 1
        facts = m.GenerationFacts(GenerationId(asked.volume, self.epoch[node], counter, f"{counter:032x}"), GenerationKind.FROZEN, counter)
        self.generations[node].append(facts)
        return m.Taken(facts, 1.5)

    def send(self, asked: m.SendTransfer, node: str, other: str) -> object:
        assert asked.tls.peer == f"landfall://{other}/receiver"
        failure = self.fails.pop(0) if self.fails else None
        if failure is not None:
            state = S.INTERRUPTED if self.notify_on_loss else S.RUNNING
            self.transfers[other][asked.transfer] = dataclasses.replace(self.transfers[other][asked.transfer], state=state)
            if self.notify_on_loss:
                self.notify(asked.transfer)
            raise failure
        for either in (node, other):
            self.transfers[either][asked.transfer] = dataclasses.replace(self.transfers[either][asked.transfer], state=S.COMMITTED)
        target = self.transfers[other][asked.transfer].target
        self.generations[other].append(m.GenerationFacts(target, GenerationKind.COMMITTED, 0))
        self.epoch[other] = max(self.epoch[other], target.epoch)
        return [m.Progress("send", 1, 2), m.Progress("send", 2, 2), m.Sent(12288, 3, 0, 0)]

    def notify(self, transfer: UUID) -> None:
        assert self.volume
        number = 1 + max((said.sequence for said in self.outbox), default=0)
        self.outbox.append(m.Notification(number, "reception-failure", self.volume.volume, transfer, 10**18, "the peer is gone"))

    def transfer(self, number: UUID, base: GenerationId, target: GenerationId, *, sending: bool, state: m.TransferState) -> m.TransferFacts:
        return m.TransferFacts(number, base.volume, base, target, m.Differential.VERIFY, sending, state, 3, 1, 12288, 4096, 4, 2, 1)

    def dmi(self, transfer: UUID, node: str = "nas2") -> Dmi:
        facts = self.transfers[node][transfer]
        head = dataclasses.replace(HEAD, transfer=transfer, base=facts.base, target=facts.target)
        return dataclasses.replace(make(FILES, PIECES), head=head)

    def record(self, transfer: UUID) -> bytes:
        digest = columns.identity(b"".join(self.dmi(transfer).encode()))
        rows, bits = np.arange(PIECES, dtype=np.uint32), np.array(self.bits, dtype=np.uint8)
        return arrivals.encode_head(transfer, digest, PIECES) + arrivals.encode_batch(0, rows, bits)

    def update(self, asked: m.UpdateInstruction) -> m.Salvaged:
        raw = b"".join(self.dmi(asked.transfer).encode())
        assert asked.dmi_digest == columns.identity(raw).hex()
        facts = self.transfers["nas2"][asked.transfer]
        self.transfers["nas2"][asked.transfer] = dataclasses.replace(facts, state=S.SALVAGED)
        salvaged = m.GenerationFacts(dataclasses.replace(facts.target, nonce="f" * 32), GenerationKind.SALVAGED, 1, facts.target)
        self.generations["nas2"].append(salvaged)
        return m.Salvaged(salvaged, (), len(asked.files), 10, 0.5)

    def undo(self, asked: m.UndoSalvage) -> m.Done:
        for number, facts in self.transfers["nas2"].items():
            if facts.state is S.SALVAGED:
                self.transfers["nas2"][number] = dataclasses.replace(facts, state=S.INTERRUPTED)
                self.generations["nas2"].pop()
                return m.Done()
        raise NoSuchTransfer("nothing to undo")

    def with_volume(self, site: Site) -> Pair:
        """Add the volume."""
        from mgmt import run

        run.add_volume(site, "projects", filesystem=FilesystemKind.EXT4, size_bytes=1 << 30, primary="nas1", secondary="nas2")
        return self


def die() -> BaseException:
    """As an entry of ``fails``: the agent dies."""
    return EOFError()


def lose(error: type[LandfallError]) -> BaseException:
    """As an entry of ``fails``: the agent answers this error."""
    return error("as the script says")
