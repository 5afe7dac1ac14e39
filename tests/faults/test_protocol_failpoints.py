"""Every step of the protocol has a failpoint before it and one after it; the agent dies at each, and nothing is lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agent.contract import messages as m
from tests.faults import phases
from tests.faults.case import Case
from tests.faults.phases import Phase

AGENT = Path(__file__).parents[2] / "agent"
CLONES = ("begin", "operational")
"""What ``substrate.{step}`` stands for: a workspace's clone and the operational image's."""

SOURCE = (
    "src.before_connect",
    "src.after_connect",
    "src.before_mgmtinfo",
    "src.within_mgmtinfo",
    "src.after_mgmtinfo",
    "src.after_dmi_stored",
    "src.before_batch:2",
    "src.within_batch:2",
    "src.after_batch:2",
    "src.before_commit",
    "src.after_finish",
    "src.after_commit",
    "src.before_release",
    "src.after_release",
)
TARGET = (
    "dst.before_listen",
    "dst.after_listen",
    "dst.after_accept",
    "dst.before_dmi_durable",
    "files.before_rename:4",
    "files.after_rename:4",
    "dst.after_dmi_durable",
    "dst.before_prepare",
    "substrate.begin.before",
    "substrate.begin.before_rename",
    "substrate.begin.after",
    "loop.attached",
    "dst.after_prepare",
    "dst.before_write:2",
    "dst.after_write:2",
    "dst.before_datasync",
    "dst.after_datasync",
    "dst.before_record",
    "dst.after_record",
    "dst.before_verify",
    "dst.after_verify",
    "dst.before_commit",
    "substrate.commit.before_rename",
    "substrate.commit.after_rename",
    "dst.after_commit",
    "dst.before_ack",
    "dst.after_ack",
)
TELLING = ("dst.before_notification", "dst.after_notification")
HEALING = (
    "substrate.begin.before:2",
    "substrate.begin.before_rename:2",
    "substrate.begin.after:2",
    "dst.after_write:2",
    "substrate.replace.before",
    "substrate.replace.after",
    "substrate.commit.before_rename",
)
SALVAGE = (
    "recovery.before_clone",
    "substrate.begin.before_rename",
    "recovery.after_clone",
    "recovery.before_mount",
    "recovery.after_mount",
    "recovery.file:1",
    "recovery.file:20",
    "recovery.before_namespace",
    "recovery.after_namespace",
    "recovery.before_verify",
    "recovery.after_verify",
    "recovery.before_commit",
    "substrate.commit.before_rename",
    "substrate.commit.after_rename",
    "recovery.after_commit",
    "recovery.before_record",
    "recovery.after_record",
)
UNDO = ("substrate.drop.before", "substrate.drop.half", "substrate.drop.after")
DROP = UNDO
DISCARD = ("substrate.discard.before", "substrate.discard.after", "dst.before_discard", "dst.after_discard")
TAKE = (
    "substrate.take.before_freeze",
    "substrate.take.frozen",
    "substrate.take.after_thaw",
    "substrate.take.before_record",
    "substrate.take.before_rename",
    "substrate.take.after",
)
BUILD = (
    "src.before_build",
    "differential.table_stored",
    "differential.names_stored",
    "src.before_dmi_durable",
    "src.after_dmi_durable",
    "src.after_build",
)
SERVE = (
    "substrate.operational.before",
    "substrate.operational.before_rename",
    "substrate.operational.after",
    "promote.before_role",
    "promote.after_role",
    "serve.before_mount",
    "serve.after_mount",
    "serve.before_export",
    "serve.after_export",
)
DEMOTE = (
    "unserve.before_export",
    "unserve.after_export",
    "unserve.before_mount",
    "unserve.after_mount",
    "demote.before_keep",
    "demote.after_keep",
    "demote.before_role",
    "demote.after_role",
)
CREATE = ("substrate.create.before", "substrate.create.before_rename", "substrate.create.after")
ADOPT = ("substrate.adopt.before", "substrate.adopt.half", "substrate.adopt.after")
GROW = ("substrate.grow.before", "substrate.grow.half", "substrate.grow.after")
END = ("remove.before_records", "remove.after_records")
REMOVE = ("substrate.remove.before", "substrate.remove.renamed", "substrate.remove.after")

FAILPOINTS: tuple[tuple[Phase, tuple[str, ...]], ...] = (
    (phases.create_dies, CREATE),
    (phases.adopt_dies, ADOPT),
    (phases.remove_dies, REMOVE),
    (phases.end_dies, END),
    (phases.grow_dies, GROW),
    (phases.take_dies, TAKE),
    (phases.drop_dies, DROP),
    (phases.build_dies, BUILD),
    (phases.source_dies, SOURCE),
    (phases.target_dies, TARGET),
    (phases.target_dies_telling, TELLING),
    (phases.target_dies_healing, HEALING),
    (phases.salvage_dies, SALVAGE),
    (phases.undo_dies, UNDO),
    (phases.discard_dies, DISCARD),
    (phases.serve_dies, SERVE),
    (phases.demote_dies, DEMOTE),
    (phases.hearing_dies, ("term.before_record", "term.after_record")),
)
"""Which agent, in which phase, dies at which failpoint (and at its which passing)."""

ELSEWHERE = {
    # Only device-mapper goes there.
    "thin_map.reserved": "storage/test_volume_lvm_pool.py",
    "substrate.merge.kept": "storage/test_volume_lvm_merge.py",
    "substrate.merge.journalled": "storage/test_volume_lvm_merge.py",
    "substrate.merge.merged": "storage/test_volume_lvm_merge.py",
    "substrate.merge.after": "storage/test_volume_lvm_merge.py",
    "substrate.operational.journalled": "storage/test_volume_lvm_merge.py",
    "substrate.operational.copied": "storage/test_volume_lvm_merge.py",
    "substrate.recover.before_sweep": "storage/test_volume_lvm_merge.py",
    "substrate.grow.journalled": "storage/test_volume_lvm_snapshot.py",
    "substrate.grow.detached": "storage/test_volume_lvm_snapshot.py",
    "substrate.grow.extended": "storage/test_volume_lvm_snapshot.py",
    "substrate.grow.rejoined": "storage/test_volume_lvm_snapshot.py",
    # Single files.
    "restore.before_rename": "faults/test_rescue.py",
    "restore.after_rename": "faults/test_rescue.py",
    "rescue.src.before_content": "faults/test_rescue.py",
    "rescue.src.before_finish": "faults/test_rescue.py",
    "rescue.dst.after_file": "faults/test_rescue.py",
    # These want a network.
    "address.before_take": "lab/test_serving.py",
    "address.recorded": "lab/test_serving.py",
    "address.after_take": "lab/test_serving.py",
    "address.before_drop": "lab/test_serving.py",
    "address.after_drop": "lab/test_serving.py",
}
"""Points on a way that this rig does not go, and the test that dies there."""

ROWS = [(phase, point) for phase, points in FAILPOINTS for point in points]


def test_every_failpoint_of_the_agent_has_a_row_here() -> None:
    named = {name for path in AGENT.rglob("*.py") for name in re.findall(r'failpoint(?:\(|, )f?"([^"]+)"', path.read_text())}
    named = {name.replace("{step}", step) for name in named for step in CLONES}
    for name, test in ELSEWHERE.items():
        assert re.search(rf'"{name}("|=kill)', (AGENT.parent / "tests" / test).read_text()), name
    assert named - ELSEWHERE.keys() == {point.partition(":")[0] for _, point in ROWS}


OTHERWISE = {
    "src.after_dmi_stored": "src.after_mgmtinfo",  # the source waits in between
    "src.after_finish": "src.before_commit",
    "dst.after_accept": "dst.after_listen",  # the target waits in between
    "substrate.take.after_thaw": "substrate.take.frozen",
    "substrate.take.before_freeze": "substrate.take.frozen",
    "substrate.take.before_record": "substrate.take.before_rename",
    "substrate.commit.before_rename": "substrate.commit.after_rename",
}
"""Where the point on the other side of a step has another name."""


def test_every_step_has_a_point_before_it_and_one_after_it() -> None:
    names = {point.partition(":")[0] for _, point in ROWS}
    for name in names:
        if name in OTHERWISE:
            assert OTHERWISE[name] in names
        elif name.startswith("substrate.") and name.endswith(".before_rename"):
            assert name.removesuffix("_rename").replace(".before", ".after") in names
        elif "before" in name:
            assert {name.replace("before", "after"), name.replace("before", "renamed")} & names, name
        elif "after" in name:
            assert {name.replace("after", "before"), name.replace("after", "before_rename")} & names, name


@pytest.mark.parametrize(("phase", "point"), ROWS, ids=[f"{phase.__name__}-{point.replace(':', '-')}" for phase, point in ROWS])
def test_the_agent_dies_at_every_step_and_nothing_is_lost(phase: Phase, point: str, request: pytest.FixtureRequest) -> None:
    number = ROWS.index((phase, point))
    case: Case = request.getfixturevalue(("ext4_case", "xfs_case")[number % 2])
    name, _, passing = point.partition(":")
    phase(case, f"{name}=kill:{passing or 1}", tuple(m.Differential)[number // 2 % 2])
