"""Salvage: the base plus the files that arrived whole, verified, as a generation of its own; and back again.

Two ways to the same tree. Roll forward: workspace (a clone of the base), for an empty base a new filesystem, mount, apply, unmount, verify.
Roll back, where all of the target's metadata arrived and little is missing: prove (the landing volume's metadata and whole files),
workspace (a clone of the landing volume), mount, apply (undo what is not whole), unmount, verify; where that fails, roll forward. Then
commit. Until its rename only the clone was written: if we die before it, ``recover`` throws the clone away and salvage runs again; after
it, salvage is done. The landing volume, the DMI and the arrival record are read and stay as they are, so an undone salvage leaves a
transfer that can be resumed.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final
from uuid import UUID

from agent.blockio.device import Device
from agent.contract.arrival import ArrivalRecord
from agent.contract.dmi import Change, Dmi, Side
from agent.contract.errors import LandfallError, NoSpace, NoSuchGeneration, SalvageFailed
from agent.contract.identity import GenerationKind, next_generation
from agent.contract.messages import Deletions, FileOutcome, GenerationFacts, Outcome, Progress, Salvaged, UpdateInstruction, newest
from agent.recovery.apply import NO_ROOM, Applied, Tick, apply_plan
from agent.recovery.back import NOTHING, Proved, exchange_journal, hindrance, is_cheaper, prove
from agent.recovery.check import check_instruction
from agent.recovery.mount import mounted, unmount
from agent.recovery.plan import HELD, Plan, make_plan
from agent.recovery.source import Arrived, Earlier, Told, Version
from agent.recovery.verify import Verified, verify
from agent.system import clock
from agent.system.failpoint import failpoint
from agent.volume import filesystem
from agent.volume.substrate import Substrate, Workspace, WorkspaceKind

log = logging.getLogger("landfall.agent")

_BASE: Final = ".base"


class Way(StrEnum):
    """From which side a salvage comes to its result."""

    FORWARD = "forward"  # from the base
    BACK = "back"  # from the landing volume


def _silent(progress: Progress) -> None:
    """Say nothing of progress."""


@dataclass(frozen=True, slots=True)
class SalvageJob:
    """What a salvage works with. ``mount_folder`` is the agent's own, mode 0700; every mount is made below it."""

    substrate: Substrate
    dmi: Dmi
    arrival: ArrivalRecord
    instruction: UpdateInstruction
    mount_folder: Path
    progress: Callable[[Progress], None] = _silent
    way: Way | None = None  # None: the cheaper one; a roll back that cannot be becomes a roll forward

    @property
    def workspace(self) -> Workspace:
        """The clone of the base."""
        return Workspace(self.dmi.head.base.volume, self.dmi.head.transfer, WorkspaceKind.SALVAGE)

    @property
    def landing(self) -> Workspace:
        """The volume in which the pieces landed."""
        return Workspace(self.dmi.head.base.volume, self.dmi.head.transfer, WorkspaceKind.LANDING)

    @property
    def mount_point(self) -> Path:
        """Where the clone is mounted; its name says whose it is, so that ``recover`` knows what to sweep."""
        return self.mount_folder / f"{self.workspace.volume}.{self.workspace.transfer}"

    @property
    def base_mount_point(self) -> Path:
        """Where a roll back mounts the base."""
        return self.mount_point.with_name(self.mount_point.name + _BASE)


@dataclass(frozen=True, slots=True)
class _Made:
    """A workspace with the result in it, verified."""

    plan: Plan
    excluded: dict[int, FileOutcome]
    verified: Verified


def salvage(job: SalvageJob) -> Salvaged:
    """Store the designated files in a clone of the base, verify it and commit it as the newest generation.

    Errors: RequestRefused, FileNotWhole (the instruction), DmiMalformed (names that contradict each other), NoSpace, DeviceBusy,
    SalvageFailed, VerifyFailed; after each the base is what it was. A file that proves damaged or for which there is no room is left
    out and is in ``exceptions``. If we die here, nothing was committed, or all.
    """
    begun = clock.monotonic_s()
    designated = check_instruction(job.instruction, job.dmi, job.arrival)
    made = _roll_back(job, designated) if _way(job, designated) is Way.BACK else None
    try:
        made = made or _roll_forward(job, designated)
        facts = _commit(job)
    except OSError as error:
        _give_up(job)
        if error.errno in NO_ROOM:
            raise NoSpace("there is no room to make the salvaged volume", cause=str(error)) from error
        raise SalvageFailed("the clone of the base could not be written", cause=_words(error)) from error
    except LandfallError:
        _give_up(job)
        raise
    exceptions = sorted((*made.plan.outcomes, *made.excluded.values()), key=lambda outcome: outcome.file)
    return Salvaged(facts, tuple(exceptions), made.verified.files, made.verified.bytes, round(clock.monotonic_s() - begun, 3))


def undo(job: SalvageJob) -> None:
    """Give the salvaged generation back, so that the transfer can be resumed. NoSuchGeneration if the newest is not this salvage's;
    DeviceBusy while it is in use. If we die here it is there or not."""
    last = newest(job.substrate.generations(job.dmi.head.base.volume))
    if last.kind is not GenerationKind.SALVAGED or last.salvaged_from != job.dmi.head.target:
        raise NoSuchGeneration("the newest generation is not a salvage of this transfer", fix="`landfall status` shows what there is.")
    job.substrate.drop(last.id)


def recover(substrate: Substrate, mount_folder: Path) -> None:
    """Sweep what a crash left: mounts below ``mount_folder``, and clones that were not committed. Idempotent; run at every start."""
    for mount_point in sorted(mount_folder.iterdir()) if mount_folder.is_dir() else []:
        volume, _, transfer = mount_point.name.removesuffix(_BASE).partition(".")
        try:
            workspace = Workspace(UUID(volume), UUID(transfer), WorkspaceKind.SALVAGE)
        except ValueError:
            continue
        _sweep(substrate, workspace, mount_point)


def _sweep(substrate: Substrate, workspace: Workspace, mount_point: Path) -> None:
    """Take away one clone or the base beside it, and the mount, the folder last, so that a crash here is swept again."""
    unmount(mount_point)
    if mount_point.name.endswith(_BASE):
        mount_point.rmdir()
        return
    if any(record.id == workspace.volume for record in substrate.volumes()):
        substrate.discard(workspace)
    if mount_point.is_dir():
        mount_point.rmdir()


def _way(job: SalvageJob, designated: tuple[int, ...]) -> Way:
    """Return how to come to the result: rolling back only where that can be."""
    reason = "the substrate cannot clone a landing volume" if not job.substrate.branches else hindrance(job.dmi, job.arrival)
    if job.way is Way.BACK and reason:
        log.warning("salvage of transfer %s: it is not rolled back: %s", job.dmi.head.transfer, reason)
    if reason or job.way is not None:
        return Way.FORWARD if reason else job.way or Way.FORWARD
    return Way.BACK if is_cheaper(job.dmi, designated, apply_deletions=_apply_deletions(job, {})) else Way.FORWARD


def _roll_back(job: SalvageJob, designated: tuple[int, ...]) -> _Made | None:
    """Undo in a clone of the landing volume what is not to be in the result. None where that failed: nothing is left of it."""
    try:
        with _landing(job) as landing:
            proved = prove(landing, job.dmi, designated, _ticking(job, "prove", len(designated)))
        excluded = proved.damaged | (_broken_with(job, proved.damaged) if proved.damaged else {})
        _make_workspace(job, lambda: job.substrate.branch(job.workspace, job.landing))
        job.base_mount_point.mkdir(mode=0o700, exist_ok=True)
        unmount(job.base_mount_point)
        kind, base = job.dmi.head.filesystem, job.dmi.head.base
        with job.substrate.reading(base) as base_device:
            with job.substrate.writing(job.workspace) as device:
                exchange_journal(job.dmi, job.arrival, device, base_device)
            with mounted(base_device, job.base_mount_point, kind, read_only=True) as base_fd:
                earlier = Earlier(job.dmi, base_fd)
                with _mounted_clone(job) as mount_fd:
                    plan = _plan(job, designated, excluded, base_fd, Side.TARGET)
                    applied = apply_plan(plan, job.dmi, earlier, mount_fd, _ticking(job, "apply", len(plan.create) + len(plan.update)))
                    job.progress(Progress("unmount", 0, 1))
                verified = _verify(job, plan, earlier, applied, proved)
        job.base_mount_point.rmdir()
        return _Made(plan, excluded, verified)
    except (LandfallError, OSError) as error:
        log.warning("salvage of transfer %s: rolling back failed, it is rolled forward: %s", job.dmi.head.transfer, error)
        _give_up(job)
        return None


def _roll_forward(job: SalvageJob, designated: tuple[int, ...]) -> _Made:
    """Store what is designated into a clone of the base, again and again without what proves damaged or has no room."""
    excluded: dict[int, FileOutcome] = {}
    while True:
        plan, applied = _attempt(job, designated, excluded)
        if not applied.excluded:
            return _Made(plan, excluded, _verify(job, plan, Told(job.dmi), applied, NOTHING))
        excluded |= applied.excluded
        excluded |= _broken_with(job, excluded)


def _attempt(job: SalvageJob, designated: tuple[int, ...], excluded: dict[int, FileOutcome]) -> tuple[Plan, Applied]:
    """Make the clone and store what is designated and not excluded."""
    dmi = job.dmi
    _make_workspace(job, lambda: job.substrate.begin(job.workspace, dmi.head.base))
    if dmi.head.base.counter == 0:
        with job.substrate.writing(job.workspace) as device:
            job.progress(Progress("mkfs", 0, 1))
            filesystem.make_like(device, dmi.head.filesystem, dmi.head.mkfs_arguments)
    with _mounted_clone(job) as mount_fd:
        plan = _plan(job, designated, excluded, mount_fd, Side.BASE)
        total = len(plan.create) + len(plan.update)
        with _landing(job) as landing:
            applied = apply_plan(plan, dmi, Arrived(dmi, landing), mount_fd, _ticking(job, "apply", total))
        job.progress(Progress("unmount", 0, 1))
    return plan, applied


def _make_workspace(job: SalvageJob, make: Callable[[], None]) -> None:
    """Make the clone, after the folder by whose name ``recover`` finds it."""
    job.progress(Progress("workspace", 0, 1))
    failpoint("recovery.before_clone")
    job.mount_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    job.mount_point.mkdir(mode=0o700, exist_ok=True)
    unmount(job.mount_point)
    make()
    failpoint("recovery.after_clone")
    job.progress(Progress("workspace", 1, 1))


@contextmanager
def _mounted_clone(job: SalvageJob) -> Iterator[int]:
    """Mount the clone for writing and give a descriptor of its root."""
    with job.substrate.writing(job.workspace) as device:
        job.progress(Progress("mount", 0, 1))
        failpoint("recovery.before_mount")
        with mounted(device, job.mount_point, job.dmi.head.filesystem, read_only=False) as mount_fd:
            failpoint("recovery.after_mount")
            yield mount_fd


def _plan(job: SalvageJob, designated: tuple[int, ...], excluded: dict[int, FileOutcome], base_fd: int, side: Side) -> Plan:
    """Return the plan for a clone of one side; ``base_fd`` is the root of the base, or of a clone of it."""
    return make_plan(
        job.dmi,
        [row for row in designated if row not in excluded],
        apply_deletions=_apply_deletions(job, excluded),
        expected=Outcome.DELETED if job.instruction.complete or job.instruction.deletions is Deletions.APPLY else Outcome.HELD,
        root_names=[name for name in map(os.fsencode, os.listdir(base_fd)) if name.startswith(HELD)],
        side=side,
    )


def _ticking(job: SalvageJob, step: str, total: int) -> Tick:
    """Return what tells the progress of a step, at most some two hundred times."""
    every = max(1, total // 200)

    def tick(done: int) -> None:
        if done % every == 0 or done == total:
            job.progress(Progress(step, done, total))

    return tick


def _give_up(job: SalvageJob) -> None:
    """Throw the clone away; where that fails too, ``recover`` does it at the next start, and the first error is the one to tell."""
    with suppress(LandfallError, OSError):
        _sweep(job.substrate, job.workspace, job.mount_point)
    with suppress(LandfallError, OSError):
        if job.base_mount_point.is_dir():
            _sweep(job.substrate, job.workspace, job.base_mount_point)


def _broken_with(job: SalvageJob, excluded: dict[int, FileOutcome]) -> dict[int, FileOutcome]:
    """Return the designated members of atomic sets that lost a member, and of sets that these break in turn."""
    gone, found = set(excluded), dict[int, FileOutcome]()
    designated = set(job.instruction.files)
    while members := {row for rows in job.instruction.atomic_sets if gone.intersection(rows) for row in rows} & designated - gone:
        for row in members:
            outcome = Outcome.ABSENT if job.dmi.change[row] & Change.NEW else Outcome.KEPT
            found[row] = FileOutcome(row, outcome, "it belongs to an atomic set of which another file could not be stored")
        gone |= members
    return found


def _apply_deletions(job: SalvageJob, excluded: dict[int, FileOutcome]) -> bool:
    """Whether deletions are applied: by policy, unless a broken atomic set has deleted members; always where nothing was left out."""
    if job.instruction.complete and not excluded:
        return True
    broken = {row for rows in job.instruction.atomic_sets if excluded.keys() & set(rows) for row in rows}
    return job.instruction.deletions is Deletions.APPLY and not any(job.dmi.change[row] & Change.DELETED for row in broken)


@contextmanager
def _landing(job: SalvageJob) -> Iterator[Device]:
    with job.substrate.writing(job.landing) as path, Device.open_reading(path) as device:
        yield device


def _verify(job: SalvageJob, plan: Plan, source: Version, applied: Applied, proved: Proved) -> Verified:
    """Read back what was stored, through a new mount, from the device."""
    failpoint("recovery.before_verify")
    total = len(plan.create) + len(plan.update) + len(plan.keep)
    with (
        job.substrate.writing(job.workspace) as device,
        mounted(device, job.mount_point, job.dmi.head.filesystem, read_only=True) as mount_fd,
    ):
        verified = verify(plan, job.dmi, source, applied, mount_fd, _ticking(job, "verify", total), proved)
    failpoint("recovery.after_verify")
    return verified


def _commit(job: SalvageJob) -> GenerationFacts:
    """Make the clone a generation under a fresh identity, after the newest that this node holds."""
    volume = job.dmi.head.base.volume
    record = next(record for record in job.substrate.volumes() if record.id == volume)
    counter = max(facts.id.counter for facts in job.substrate.generations(volume))
    facts = GenerationFacts(
        next_generation(volume, record.epoch, counter), GenerationKind.SALVAGED, clock.wall_ns(), salvaged_from=job.dmi.head.target
    )
    job.progress(Progress("commit", 0, 1))
    failpoint("recovery.before_commit")
    job.substrate.commit(job.workspace, facts)
    failpoint("recovery.after_commit")
    job.mount_point.rmdir()
    job.progress(Progress("commit", 1, 1))
    return facts


def _words(error: OSError) -> str:
    return f"{errno.errorcode.get(error.errno or 0, '?')} {error}"
