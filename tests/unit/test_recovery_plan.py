"""The plan of names, rule by rule."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from agent.contract.dmi import SPECS, Change, Dmi, FileKind, Side
from agent.contract.errors import DmiMalformed
from agent.contract.identity import GenerationId, empty_generation
from agent.contract.messages import Outcome
from agent.recovery.plan import Folder, Plan, Slot, make_plan
from tests.unit.dmi_samples import VOLUME, sample_head

ROOT = Folder(2)
BASE = GenerationId(VOLUME, 1, 1, "1" * 32)
TARGET = GenerationId(VOLUME, 1, 2, "2" * 32)


@dataclass(frozen=True, slots=True)
class File:
    """An inode with its names as (inode of the directory, path)."""

    inode: int
    base: tuple[tuple[int, bytes], ...] = ()
    target: tuple[tuple[int, bytes], ...] = ()
    kind: FileKind = FileKind.REGULAR
    generation: int = 1


def dmi_of(*files: File, base: GenerationId = BASE) -> Dmi:
    names = [(row, side, *name) for row, file in enumerate(files) for side in Side for name in (file.base, file.target)[side]]
    columns = {spec.name: np.zeros(0, dtype=spec.dtype) for spec in SPECS[1:]}
    for spec in SPECS[1:]:
        if spec.name.endswith("_start"):
            columns[spec.name] = np.zeros(len(files) + 1, np.uint64)
    for name in ("xattr_name_start", "xattr_value_start"):
        columns[name] = np.zeros(1, np.uint64)
    per_file = ("mode", "uid", "gid", "nlink", "size", "mtime_s", "mtime_ns", "device", "project", "attr_flags", "file_digest")
    for name in per_file:
        columns[name] = np.zeros(len(files), next(spec.dtype for spec in SPECS if spec.name == name))
    change = [Change.DELETED if not file.target else Change.NEW if not file.base else Change.NAMES for file in files]
    columns |= {
        "inode": np.array([file.inode for file in files], np.uint64),
        "inode_generation": np.array([file.generation for file in files], np.uint32),
        "kind": np.array([file.kind for file in files], np.uint8),
        "change": np.array(change, np.uint8),
        "name_start": np.searchsorted([name[0] for name in names], np.arange(len(files) + 1)).astype(np.uint64),
        "name_side": np.array([name[1] for name in names], np.uint8),
        "name_parent": np.array([name[2] for name in names], np.uint64),
        "name_path_start": np.cumsum([0, *(len(name[3]) for name in names)]).astype(np.uint64),
        "paths": np.frombuffer(b"".join(name[3] for name in names), np.uint8),
    }
    dmi = Dmi(replace(sample_head(), base=base, target=TARGET), **columns)
    return Dmi.decode(b"".join(dmi.encode()))


def plan_of(*files: File, designated: tuple[int, ...] = (), apply: bool = False, root_names: tuple[bytes, ...] = ()) -> Plan:
    expected = Outcome.DELETED if apply else Outcome.HELD
    return make_plan(dmi_of(*files), designated, apply_deletions=apply, expected=expected, root_names=root_names)


OLD = File(20, base=((2, b"f"),))
NEW = File(21, target=((2, b"f"),))


def test_H11_a_renamed_file_is_moved_designated_or_not() -> None:
    renamed = File(20, ((2, b"a"),), ((2, b"b"),))
    for designated in ((), (0,)):
        plan = plan_of(renamed, designated=designated)
        (placement,) = plan.move
        assert (placement.leave, placement.stay, placement.take) == ((Slot(ROOT, b"a"),), (), (Slot(ROOT, b"b"),))
        assert plan.update == designated


def test_a_new_file_that_is_not_whole_is_absent() -> None:
    plan = plan_of(File(20, target=((2, b"a"),)))
    assert not plan.create
    assert not plan.move


@pytest.mark.parametrize("apply", [False, True])
def test_the_old_file_stays_where_a_file_that_is_not_whole_replaces_it(apply: bool) -> None:
    plan = plan_of(OLD, NEW, apply=apply)
    assert not plan.move
    assert not plan.remove
    assert not plan.create
    assert [outcome.outcome for outcome in plan.outcomes] == ([Outcome.HELD] if apply else [])


def test_a_whole_file_replaces_the_old_one() -> None:
    plan = plan_of(OLD, NEW, designated=(1,), apply=True)
    assert [placement.row for placement in plan.remove] == [0]
    assert plan.create == (1,)


def test_a_held_file_whose_name_is_taken_goes_aside() -> None:
    plan = plan_of(OLD, NEW, designated=(1,))
    aside = next(placement for placement in plan.move if placement.row == 0)
    assert aside.aside == (b"f",)
    assert plan.held_name == b".landfall-held"
    assert [(outcome.outcome, outcome.path) for outcome in plan.outcomes] == [(Outcome.HELD, ".landfall-held/f")]


def test_the_folder_of_held_files_never_has_a_name_that_is_taken() -> None:
    taken = File(30, target=((2, b".landfall-held-2"),))
    assert plan_of(taken, designated=(0,), root_names=(b".landfall-held",)).held_name == b".landfall-held-3"


@pytest.mark.parametrize("apply", [False, True])
def test_H12_deletions(apply: bool) -> None:
    folder = File(40, ((2, b"d"),), kind=FileKind.DIRECTORY)
    inside = File(41, ((40, b"d/f"),))
    plan = plan_of(folder, inside, apply=apply)
    assert not plan.move
    assert not plan.outcomes
    assert [placement.row for placement in plan.remove] == ([0, 1] if apply else [])


def test_a_folder_that_was_made_anew_takes_in_what_is_held_of_the_old() -> None:
    old = File(40, ((2, b"d"),), kind=FileKind.DIRECTORY)
    held = File(41, ((40, b"d/held"),))
    replaced = File(42, ((40, b"d/replaced"),))
    new = File(50, target=((2, b"d"),), kind=FileKind.DIRECTORY)
    inside = File(51, target=((50, b"d/replaced"),))
    plan = plan_of(old, held, replaced, new, inside, designated=(3, 4))
    moves = {placement.row: placement for placement in plan.move}
    assert moves[1].take == (Slot(Folder(50, 3), b"held"),)
    assert moves[2].aside == (b"d/replaced",)
    assert [placement.row for placement in plan.remove] == [0]


def test_a_new_folder_that_something_needs_is_made_though_it_is_not_designated() -> None:
    outer = File(40, target=((2, b"d"),), kind=FileKind.DIRECTORY)
    inner = File(41, target=((40, b"d/e"),), kind=FileKind.DIRECTORY)
    file = File(42, target=((41, b"d/e/f"),))
    plan = plan_of(outer, inner, file, designated=(2,))
    assert plan.create == (0, 1, 2)
    assert [(outcome.file, outcome.outcome) for outcome in plan.outcomes] == [(0, Outcome.RECOVERED), (1, Outcome.RECOVERED)]


def test_H2_a_hard_link_keeps_the_names_that_stay() -> None:
    linked = File(20, ((2, b"a"), (2, b"b")), ((2, b"b"), (2, b"c")))
    (placement,) = plan_of(linked, designated=(0,)).move
    assert (placement.leave, placement.stay, placement.take) == ((Slot(ROOT, b"a"),), (Slot(ROOT, b"b"),), (Slot(ROOT, b"c"),))


def test_an_inode_number_that_was_reused_is_two_inodes() -> None:
    plan = plan_of(File(20, ((2, b"old"),)), File(20, target=((2, b"new"),), generation=2), designated=(1,), apply=True)
    assert plan.create == (1,)
    assert [placement.row for placement in plan.remove] == [0]


def test_an_inode_without_a_name_in_the_base_is_made_anew() -> None:
    dmi = dmi_of(File(20, target=((2, b"linked again"),)))
    object.__setattr__(dmi, "change", np.array([Change.NAMES], np.uint8))
    assert make_plan(dmi, [0], apply_deletions=False).create == (0,)


@pytest.mark.parametrize(
    "files",
    [
        (File(20, target=((2, b"a"),)), File(21, target=((2, b"a"),))),
        (File(20, ((2, b"a"),)), File(21, ((2, b"a"),))),
        (File(20, target=((2, b"a"),)), File(21, target=((20, b"a/b"),))),
        (File(20, target=((2, b"a"),), kind=FileKind.DIRECTORY), File(21, target=((20, b"elsewhere/b"),))),
        (File(20, ((2, b"a"),), kind=FileKind.DIRECTORY), File(21, target=((20, b"a/b"),))),
        (File(20, target=((2, b"a"), (2, b"b")), kind=FileKind.DIRECTORY),),
        (File(20, target=((20, b"a/a"),), kind=FileKind.DIRECTORY),),
        (File(20, target=((21, b"b/a"),), kind=FileKind.DIRECTORY), File(21, target=((20, b"a/b"),), kind=FileKind.DIRECTORY)),
        (File(20, target=((2, b"a/b"),)),),
        (File(20, target=((2, b""),)),),
        (File(2, ((2, b""),), ((2, b"root"),), FileKind.DIRECTORY),),
        (File(2, ((2, b""),), ((2, b""),)),),
        (File(2, ((2, b""),), (), FileKind.DIRECTORY),),
        (File(20, target=((99, b"x/a"),)), File(21, target=((99, b"y/b"),))),
        (File(20, ((2, b"a"),), ((2, b"a"),)), File(20, ((2, b"b"),), ((2, b"b"),), generation=2)),
    ],
)
def test_G4_names_that_contradict_each_other_are_refused(files: tuple[File, ...]) -> None:
    with pytest.raises(DmiMalformed):
        plan_of(*files, designated=tuple(range(len(files))))


def test_against_the_empty_base_every_folder_is_in_the_dmi() -> None:
    dmi = dmi_of(File(20, target=((99, b"x/a"),)), base=empty_generation(VOLUME))
    with pytest.raises(DmiMalformed):
        make_plan(dmi, [0], apply_deletions=False)
