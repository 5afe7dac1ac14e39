"""A transfer's folder on this node: what it is, its DMI, its arrival record. Everything in it survives power loss.

``<folder>/<transfer>/transfer.json`` says what it is and where it stands, ``dmi`` is the DMI's bytes, whole or not there, ``arrival`` is
the arrival record. A folder whose name begins with a dot is being made or removed, and is swept at the start.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from agent.contract import arrival
from agent.contract.columns import identity
from agent.contract.dmi import Dmi
from agent.contract.errors import DeviceFailed, NoSpace, NoSuchTransfer, RecordMalformed, RequestRefused, TransferBusy, VersionUnknown
from agent.contract.identity import GenerationId
from agent.contract.messages import Differential, TransferState, from_document, to_document
from agent.system import files
from agent.system.failpoint import failpoint

VERSION: Final = 1
_JSON_BYTES: Final = 1 << 20
DISTRUSTED: Final = "distrusted"
"""The mark beside an arrival record whose landing volume lost a write."""


@dataclass(frozen=True, slots=True)
class TransferRecord:
    """What a node remembers of a transfer."""

    id: UUID
    base: GenerationId
    target: GenerationId
    differential: Differential
    sending: bool
    state: TransferState
    since_ns: int
    priorities: tuple[tuple[str, int], ...] = ()
    mends: bool = False  # it replaces damaged blocks of a generation that both nodes hold; broken off, it is begun anew


class TransferStore:
    """All transfers of a node, each in its own folder below ``folder``."""

    def __init__(self, folder: Path) -> None:
        """Make the folder if need be, and sweep what a crash left half made or half removed."""
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in folder.glob(".*"):
            shutil.rmtree(left, ignore_errors=True)
        for known in folder.iterdir():
            files.sweep(known)

    def create(self, record: TransferRecord) -> None:
        """Remember a new transfer; TransferBusy if it is known. If we die here it is there whole, or not at all."""
        if self.folder(record.id).exists():
            raise TransferBusy(f"transfer {record.id} exists already")
        making = self._folder / f".{record.id}"
        making.mkdir(mode=0o700)
        files.write_durably(making / "transfer.json", _encoded(record))
        files.rename_durably(making, self.folder(record.id))

    def save(self, record: TransferRecord) -> None:
        """Replace what is remembered of a known transfer."""
        if not self.folder(record.id).is_dir():
            raise NoSuchTransfer(f"transfer {record.id} is not known here")
        files.write_durably(self.folder(record.id) / "transfer.json", _encoded(record))

    def set_state(self, transfer: UUID, state: TransferState) -> TransferRecord:
        """Record where the transfer stands now; return the new record."""
        record = replace(self.load(transfer), state=state)
        self.save(record)
        return record

    def load(self, transfer: UUID) -> TransferRecord:
        """Return a transfer's record. NoSuchTransfer, RecordMalformed, or VersionUnknown (left as it is)."""
        path = self.folder(transfer) / "transfer.json"
        try:
            with open(path, "rb") as file:
                raw = file.read(_JSON_BYTES + 1)
        except FileNotFoundError as error:
            raise NoSuchTransfer(f"transfer {transfer} is not known here") from error
        record = _decoded(raw, path)
        if record.id != transfer:
            raise RecordMalformed(f"{path} is the record of transfer {record.id}")
        return record

    def list(self) -> tuple[UUID, ...]:
        """Return every transfer that has a folder, also those whose record cannot be read."""
        found = []
        for entry in self._folder.iterdir():
            try:
                found.append(UUID(entry.name))
            except ValueError:
                continue
        return tuple(sorted(found))

    def discard(self, transfer: UUID) -> None:
        """Forget a transfer with its DMI and arrival record. If we die here it is gone, or whole."""
        going = self._folder / f".{transfer}"
        shutil.rmtree(going, ignore_errors=True)
        try:
            files.rename_durably(self.folder(transfer), going)
        except FileNotFoundError as error:
            raise NoSuchTransfer(f"transfer {transfer} is not known here") from error
        shutil.rmtree(going)

    def folder(self, transfer: UUID) -> Path:
        """Return where a transfer's files are."""
        return self._folder / str(transfer)

    def dmi_path(self, transfer: UUID) -> Path:
        return self.folder(transfer) / "dmi"

    def arrival_path(self, transfer: UUID) -> Path:
        return self.folder(transfer) / "arrival"

    def store_dmi(self, transfer: UUID, content: bytes | Iterable[bytes]) -> None:
        """Keep the DMI's bytes; on return they are durable. If we die here there is no DMI, or all of it."""
        files.write_durably(self.dmi_path(transfer), content)

    def has_dmi(self, transfer: UUID) -> bool:
        return self.dmi_path(transfer).exists()

    def dmi_bytes(self, transfer: UUID) -> memoryview:
        """Return the stored DMI, read-only, mapped rather than read. NoSuchTransfer if there is none."""
        try:
            with open(self.dmi_path(transfer), "rb") as file:
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError as error:
            raise NoSuchTransfer(f"transfer {transfer} has no DMI here") from error
        except ValueError:  # an empty file cannot be mapped
            return memoryview(b"")

    def dmi(self, transfer: UUID) -> Dmi:
        """Return the stored DMI, checked. NoSuchTransfer, DmiMalformed, VersionUnknown."""
        return Dmi.decode(self.dmi_bytes(transfer))

    def dmi_digest(self, transfer: UUID) -> bytes:
        """Return the identity of the stored DMI (16 bytes)."""
        return identity(self.dmi_bytes(transfer))

    def distrusted(self, transfer: UUID) -> bool:
        """Whether a volume in which the transfer's pieces landed proved to lose writes."""
        return (self.folder(transfer) / DISTRUSTED).exists()

    def forget_arrival(self, transfer: UUID) -> None:
        """Forget what is recorded as arrived, and that it was distrusted. If we die here the record is gone and the mark stays."""
        files.remove_durably(self.arrival_path(transfer))
        files.remove_durably(self.folder(transfer) / DISTRUSTED)

    def arrival(self, transfer: UUID, dmi_digest: bytes, pieces: int) -> arrival.ArrivalRecord:
        """Return what has arrived; nothing where there is no record yet. RecordMalformed, VersionUnknown."""
        try:
            raw = self.arrival_path(transfer).read_bytes()
        except FileNotFoundError:
            raw = arrival.encode_head(transfer, dmi_digest, pieces)
        return arrival.decode(raw, transfer=transfer, dmi_digest=dmi_digest, pieces=pieces)


class ArrivalWriter:
    """The open arrival record of one transfer. One thread appends; ``bits`` is what the record says, one Arrived per piece."""

    def __init__(self, path: Path, transfer: UUID, dmi_digest: bytes, pieces: int) -> None:
        """Open the record, making it if need be, and cut off a torn tail. RecordMalformed or VersionUnknown leave it as it is."""
        if not path.exists():
            files.write_durably(path, arrival.encode_head(transfer, dmi_digest, pieces))
        record = arrival.decode(path.read_bytes(), transfer=transfer, dmi_digest=dmi_digest, pieces=pieces)
        self.bits: NDArray[np.uint8] = record.bits
        self._path = path
        self._sequence = record.batches
        self._failed: OSError | None = None
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
        if os.fstat(self._fd).st_size != record.valid_bytes:
            os.ftruncate(self._fd, record.valid_bytes)
            os.fsync(self._fd)

    def distrust(self) -> None:
        """Note durably that a volume here lost a write: what lies around the pieces on it is not known to be the base's any more."""
        files.write_durably(self._path.with_name(DISTRUSTED), b"")

    def append(self, pieces: NDArray[np.uint32], bits: NDArray[np.uint8]) -> None:
        """Record ``bits`` as the state of ``pieces``, durably. The caller has made durable what they speak of.

        If we die here the tail is torn and cut off at the next opening. After a failure the record is not written again.
        """
        if self._failed is not None:
            raise DeviceFailed(f"{self._path} is not trusted any more", cause=str(self._failed)) from self._failed
        for at in range(0, len(pieces), arrival.MAX_BATCH_ROWS):
            part = slice(at, at + arrival.MAX_BATCH_ROWS)
            raw = memoryview(arrival.encode_batch(self._sequence, pieces[part], bits[part]))
            try:
                failpoint("dst.before_record")
                while raw:
                    raw = raw[os.write(self._fd, raw) :]
                os.fdatasync(self._fd)
                failpoint("dst.after_record")
            except OSError as error:
                self._failed = error
                kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else DeviceFailed
                raise kind(f"the arrival record {self._path} cannot be written", cause=str(error)) from error
            self._sequence += 1
            self.bits[pieces[part]] = bits[part]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _encoded(record: TransferRecord) -> bytes:
    return json.dumps({"version": VERSION, **to_document(record)}, sort_keys=True, indent=1).encode()


def _decoded(raw: bytes, path: Path) -> TransferRecord:
    try:
        document = json.loads(raw)
        if len(raw) > _JSON_BYTES or not isinstance(document, dict) or type(document.get("version")) is not int:
            raise ValueError("it is no record")
    except (ValueError, RecursionError) as error:
        raise RecordMalformed(f"{path} cannot be read", cause=str(error)) from error
    version = document.pop("version")
    if version != VERSION:
        raise VersionUnknown(f"{path} has version {version}, this release reads {VERSION}")
    try:
        return from_document(document, TransferRecord)
    except RequestRefused as error:
        raise RecordMalformed(f"{path} cannot be read", cause=error.cause) from error
