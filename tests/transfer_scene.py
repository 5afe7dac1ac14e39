"""Small differentials made by hand, and both sides of a transfer in one process, for tests of the transfer."""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.contract.arrival import ArrivalRecord, Arrived
from agent.contract.columns import identity
from agent.contract.digest import block_digests, piece_digest
from agent.contract.dmi import HOLE, Change, Dmi, FileKind, Head, Owner
from agent.contract.identity import FilesystemKind, GenerationId
from agent.contract.messages import Differential, Sent, TlsMaterial, TransferState
from agent.transfer.order import bytes_to_send
from agent.transfer.receiver import Received, ReceiveJob, Receiver, Volumes
from agent.transfer.sender import SendJob, send
from agent.transfer.store import TransferRecord, TransferStore

BLOCK = 4096
NAS1, NAS2 = "landfall://nas1/source", "landfall://nas2/target"


@dataclass(frozen=True)
class Differential1:
    """A differential with its two generations as image files."""

    dmi: Dmi
    raw: bytes
    base: Path
    target: Path


def make_differential(
    folder: Path, *, seed: int = 1, blocks: int = 2048, pieces: int = 60, files: int = 20, text: bool = False, volume: UUID | None = None
) -> Differential1:
    """Return a differential over random pieces: some of holes, some shared, some metadata, free or journal, with files that need them."""
    generator = np.random.default_rng(seed)
    volume = volume or uuid4()
    base = generator.integers(0, 256, blocks * BLOCK, dtype=np.uint8)
    target = base.copy()
    cuts = np.sort(generator.choice(np.arange(1, blocks), 2 * pieces, replace=False))
    first = cuts[::2]
    counts = np.minimum(cuts[1::2] - first, 256)
    owner = generator.choice([0, 1, 1, 1, 1, 1, 2, 3], pieces).astype(np.uint8)
    target_hole = generator.random(pieces) < 0.1
    base_hole = generator.random(pieces) < 0.15
    for at, count, hole, of_base in zip(first.tolist(), counts.tolist(), target_hole, base_hole, strict=True):
        where = slice(at * BLOCK, (at + count) * BLOCK)
        if of_base:
            base[where] = 0
        changed = generator.integers(97, 101 if text else 256, count * BLOCK, dtype=np.uint8)
        target[where] = 0 if hole else changed
    paths = {"base": folder / "base.img", "target": folder / "target.img"}
    paths["base"].write_bytes(base.tobytes())
    paths["target"].write_bytes(target.tobytes())

    needs: list[list[int]] = [[] for _ in range(files)]
    for row in np.flatnonzero(owner == Owner.FILE).tolist():
        for file in generator.choice(files, 1 if generator.random() < 0.9 else 2, replace=False).tolist():
            needs[file].append(row)
    raw = b"".join(map(bytes, _dmi(volume, blocks, first, counts, owner, target_hole, base_hole, base, target, needs).encode()))
    return Differential1(Dmi.decode(raw), raw, paths["base"], paths["target"])


def _dmi(
    volume: UUID,
    blocks: int,
    first: Any,
    counts: Any,
    owner: Any,
    target_hole: Any,
    base_hole: Any,
    base: Any,
    target: Any,
    needs: list[list[int]],
) -> Dmi:
    files, pieces = len(needs), len(first)

    def digests(image: Any) -> Any:
        folded = [
            piece_digest(block_digests(image[at * BLOCK : (at + count) * BLOCK].tobytes()), at)
            for at, count in zip(first.tolist(), counts.tolist(), strict=True)
        ]
        return np.frombuffer(b"".join(folded), dtype="V16")

    names = [f"d{file % 3}/f{file}".encode() for file in range(files)]
    head = Head(
        uuid4(),
        GenerationId(volume, 1, 1, "1" * 32),
        GenerationId(volume, 1, 2, "2" * 32),
        1,
        2,
        "v",
        blocks * BLOCK,
        512,
        FilesystemKind.EXT4,
        ("mkfs.ext4",),
        2,
        "differential",
    )
    zeros4, zeros8 = np.zeros(files, dtype="<u4"), np.zeros(files, dtype="<u8")
    starts = np.zeros(files + 1, dtype="<u8")
    nothing8, nothing1 = np.zeros(0, dtype="<u8"), np.zeros(0, dtype="u1")
    return Dmi(
        head,
        op_block=first.astype("<u8"),
        diff_block=np.where(base_hole, np.uint64(HOLE), first.astype("<u8") + np.uint64(10**6)).astype("<u8"),
        block_count=counts.astype("<u4"),
        owner=owner,
        target_hole=target_hole.astype("u1"),
        update_digest=digests(target) if pieces else np.zeros(0, dtype="V16"),
        diff_digest=digests(base) if pieces else np.zeros(0, dtype="V16"),
        inode=np.arange(12, 12 + files, dtype="<u8"),
        inode_generation=zeros4,
        kind=np.full(files, FileKind.REGULAR, dtype="u1"),
        change=np.full(files, Change.CONTENT, dtype="u1"),
        mode=np.full(files, 0o644, dtype="<u4"),
        uid=zeros4,
        gid=zeros4,
        nlink=np.ones(files, dtype="<u4"),
        size=zeros8,
        mtime_s=np.zeros(files, dtype="<i8"),
        mtime_ns=zeros4,
        device=zeros8,
        project=zeros4,
        attr_flags=zeros4,
        file_digest=np.zeros(files, dtype="V16"),
        payload_start=starts,
        payload=nothing1,
        need_start=np.concatenate([[0], np.cumsum([len(rows) for rows in needs])]).astype("<u8"),
        need=np.array([row for rows in needs for row in rows], dtype="<u4"),
        extent_start=starts,
        extent_logical=nothing8,
        extent_physical=nothing8,
        extent_blocks=nothing8,
        extent_flags=np.zeros(0, dtype="<u4"),
        name_start=np.arange(files + 1, dtype="<u8"),
        name_side=np.ones(files, dtype="u1"),
        name_parent=np.full(files, 2, dtype="<u8"),
        name_path_start=np.concatenate([[0], np.cumsum([len(name) for name in names])]).astype("<u8"),
        paths=np.frombuffer(b"".join(names), dtype="u1"),
        xattr_start=starts,
        xattr_name_start=np.zeros(1, dtype="<u8"),
        xattr_names=nothing1,
        xattr_value_start=np.zeros(1, dtype="<u8"),
        xattr_values=nothing1,
    )


class Authority:
    """Issues certificates for two nodes, well made and otherwise."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "transfer authority")])
        self._certificate = self._sign(self._name, self._key, x509.BasicConstraints(ca=True, path_length=0), None, "", 0, 1)

    @property
    def pem(self) -> str:
        return self._certificate.public_bytes(serialization.Encoding.PEM).decode()

    def material(
        self, node: str, peer: str, *, usage: Any = None, begins_days: int = 0, ends_days: int = 1, authority_pem: str | None = None
    ) -> TlsMaterial:
        usage = usage or (ExtendedKeyUsageOID.CLIENT_AUTH if node == NAS1 else ExtendedKeyUsageOID.SERVER_AUTH)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "node")])
        certificate = self._sign(name, key, x509.BasicConstraints(ca=False, path_length=None), usage, node, begins_days, ends_days)
        return TlsMaterial(
            authority_pem or self.pem,
            certificate.public_bytes(serialization.Encoding.PEM).decode(),
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode(),
            peer,
        )

    def _sign(self, subject: Any, key: Any, constraints: Any, usage: Any, uri: str, begins_days: int, ends_days: int) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=begins_days, minutes=-5))
            .not_valid_after(now + datetime.timedelta(days=ends_days))
            .add_extension(constraints, critical=True)
        )
        if uri:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
        if usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
        return builder.sign(self._key, hashes.SHA256())


@dataclass
class Scene:
    """Both sides of one transfer on image files, and what became of them."""

    folder: Path
    differential: Differential1
    authority: Authority = field(default_factory=Authority)
    healed_opened: int = 0
    patience_s: float = 10.0
    """How long a target may go on after its source failed; one that then still waits for another source is cancelled."""
    limit_s: float = 60.0
    """How long a side may take in all."""

    def __post_init__(self) -> None:
        """A scene in a folder that has one is that one, as a process finds it that starts anew."""
        self.store = TransferStore(self.folder / "transfers")
        self.landing = self.folder / "landing.img"
        self.replica = self.folder / "replica.img"
        self.healed = self.folder / "healed.img"
        self.commits = self.folder / "commits"
        if self.store.list():
            return
        self.replica.write_bytes(self.differential.base.read_bytes())
        head = self.differential.dmi.head
        self.store.create(TransferRecord(head.transfer, head.base, head.target, Differential.SEND, False, TransferState.WAITING, 1))

    @property
    def committed(self) -> int:
        """How often the transfer was committed."""
        return len(self.commits.read_bytes()) if self.commits.exists() else 0

    def receive_job(self, **changes: Any) -> ReceiveJob:
        head = self.differential.dmi.head
        job = ReceiveJob(
            transfer=head.transfer,
            base=head.base,
            target=head.target,
            differential=Differential.VERIFY,
            streams=2,
            token="right",
            tls=self.authority.material(NAS2, NAS1),
            store=self.store,
            prepare=self._prepare,
            heal=self._heal,
            commit=self._commit,
            address="127.0.0.1",
            silence_limit_s=5.0,
            connect_limit_s=5.0,
            handshake_limit_s=5.0,
        )
        return replace(job, **changes)

    def send_job(self, port: int, **changes: Any) -> SendJob:
        job = SendJob(
            transfer=self.differential.dmi.head.transfer,
            address="127.0.0.1",
            port=port,
            differential=Differential.VERIFY,
            streams=2,
            token="right",
            tls=self.authority.material(NAS1, NAS2),
            dmi=self.differential.dmi,
            dmi_bytes=memoryview(self.differential.raw),
            target=self.differential.target,
            base=self.differential.base,
            batch_bytes=64 * 1024,
            silence_limit_s=5.0,
            connect_limit_s=5.0,
        )
        return replace(job, **changes)

    def transfer(
        self,
        both: dict[str, Any] | None = None,
        sending: dict[str, Any] | None = None,
        receiving: dict[str, Any] | None = None,
        through: Callable[[int], contextlib.AbstractContextManager[int]] | None = None,
    ) -> tuple[Sent | BaseException, Received | BaseException]:
        """Run both sides; return what each returned or raised. ``through`` gives the port that the source connects to for the real one."""
        receiver = Receiver(self.receive_job(**(both or {}), **(receiving or {})))
        with (through or contextlib.nullcontext)(receiver.port) as port, ThreadPoolExecutor(2) as executor:
            received = executor.submit(receiver.run)
            sent = executor.submit(send, self.send_job(port, **(both or {}), **(sending or {})))
            outcome = _outcome(sent, self.limit_s)
            if isinstance(outcome, BaseException):
                self._let_go(receiver, received)
            return outcome, _outcome(received, self.limit_s)

    def arrival(self) -> ArrivalRecord:
        dmi = self.differential.dmi
        return self.store.arrival(dmi.head.transfer, identity(self.differential.raw), dmi.piece_total)

    def check_landed(self) -> None:
        """The landing volume is the target, byte by byte, and was committed once."""
        assert self.landing.read_bytes() == self.differential.target.read_bytes()
        assert self.arrival().complete.all()

    def check_recorded(self) -> int:
        """What the record calls arrived is in the landing volume, byte by byte; return how many pieces are complete."""
        dmi = self.differential.dmi
        if not self.store.has_dmi(dmi.head.transfer):
            assert not self.store.arrival_path(dmi.head.transfer).exists()
            return 0
        record = self.arrival()
        if record.bits.any():
            landing, target = self.landing.read_bytes(), self.differential.target.read_bytes()
            for row in np.flatnonzero(record.bits & int(Arrived.UPDATE)).tolist():
                where = slice(int(dmi.op_block[row]) * BLOCK, int(dmi.op_block[row] + dmi.block_count[row]) * BLOCK)
                assert landing[where] == target[where]
        return int(record.complete.sum())

    def data_bytes(self) -> int:
        """Return how many bytes of data travel at least, so that a byte below it is one of the transfer."""
        return int(bytes_to_send(self.differential.dmi, Differential.VERIFY).sum()) * BLOCK

    def _let_go(self, receiver: Receiver, received: Future[Received]) -> None:
        """End a reception whose source is gone and that waits for another one."""
        with contextlib.suppress(Exception):
            received.exception(timeout=self.patience_s)
        receiver.cancel()

    @contextlib.contextmanager
    def _prepare(self, dmi: Dmi) -> Iterator[Volumes]:
        assert dmi.piece_total == self.differential.dmi.piece_total
        if not self.landing.exists():
            self.landing.write_bytes(self.replica.read_bytes())
        yield Volumes(self.landing, self.replica)

    @contextlib.contextmanager
    def _heal(self) -> Iterator[Path]:
        self.healed_opened += 1
        if not self.healed.exists():
            self.healed.write_bytes(self.replica.read_bytes())
        yield self.healed

    def _commit(self) -> None:
        with open(self.commits, "ab") as file:
            file.write(b"x")


def _outcome(future: Future[Any], limit_s: float) -> Any:
    error = future.exception(timeout=limit_s)
    return future.result() if error is None else error


def transfer_threads() -> list[str]:
    """Names of threads of a transfer that still run."""
    return [thread.name for thread in threading.enumerate() if thread.name in {"send", "receive", "write", "admit"}]
