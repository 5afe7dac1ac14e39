"""The drill's workload, really salvaged by the agent and accounted for by the management node, before the independent checker."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agent.contract.arrival import COMPLETE
from agent.contract.dmi import FileKind
from agent.contract.identity import FilesystemKind
from agent.contract.messages import Deletions, Outcome
from mgmt.determination import Policy, determine
from mgmt.drill.workload import change, fill
from mgmt.report import Circumstances, LossStatement, Seconds, state
from tests.storage.checker_scene import arrival_bytes, checker
from tests.storage.pools import pool_on
from tests.storage.salvage_scene import Scene


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pool_on("xfs", tmp_path_factory.mktemp("pool")) as mount_point:
        yield mount_point


def quiet(_done: int, _total: int) -> None:
    """Progress that nobody watches."""


def rows_of(statement: LossStatement) -> list[dict[str, object]]:
    return [
        {
            "paths": account.paths,
            "base_paths": account.base_paths,
            "outcome": account.outcome,
            "reason": account.reason,
            "now_at": account.found_at,
        }
        for account in statement.accounts
    ]


@pytest.mark.parametrize("deletions", list(Deletions))
@pytest.mark.parametrize("kind", list(FilesystemKind))
def test_I3_I4_I5_a_real_salvage_of_the_drills_workload(pool: Path, tmp_path: Path, kind: FilesystemKind, deletions: Deletions) -> None:
    scene = Scene(pool, kind, tmp_path)
    scene.fill(lambda root: _made(root, kind))
    scene.change(_changed)
    built = scene.build()
    chance, missing = random.Random(3), set()
    for row in built.judged():
        needs = built.dmi.needs(row).tolist()
        if needs and built.dmi.kind[row] == FileKind.REGULAR and chance.random() < 0.3:
            missing.add(chance.choice(needs))
    arrival = scene.land(built, missing)
    result, _ = scene.salvaged(scene.job(built, arrival, deletions=deletions))

    determination = determine(built.dmi, arrival, Policy(deletions))
    circumstances = Circumstances("nas1", "nas2", "somebody", 0, "0")
    statement = state(built.dmi, arrival, determination, circumstances, Seconds(0, 0, 0), salvaged=result)
    dmi = b"".join(built.dmi.encode())
    (tmp_path / "dmi").write_bytes(dmi)
    rows = [(piece, COMPLETE) for piece in np.flatnonzero(arrival.complete).tolist()]
    (tmp_path / "arrival").write_bytes(arrival_bytes(dmi, built.dmi.piece_total, [rows]))
    (tmp_path / "loss.json").write_text(json.dumps({"files": rows_of(statement), "deletions": statement.deletions}))

    base, target = (next(pool.rglob(f"{facts.id.name}.img")) for facts in (scene.base, scene.target))
    with scene.opened(result.generation) as served:
        argv: list[str | Path] = [
            "--base",
            base,
            "--target",
            target,
            "--filesystem",
            kind.value,
            "--result",
            served,
            "--loss",
            tmp_path / "loss.json",
        ]
        answer = checker(*argv, "--dmi", tmp_path / "dmi", "--arrival", tmp_path / "arrival")
        assert answer.document["findings"] == []
        assert answer.status == 0
        assert answer.document["outcomes"][Outcome.RECOVERED] > 250
        assert answer.document["outcomes"][Outcome.KEPT] > 20
        assert answer.document["outcomes"][Outcome.ABSENT] > 5
    scene.remove()


def _made(root: Path, kind: FilesystemKind) -> None:
    fill(root, 2200, (20 if kind is FilesystemKind.EXT4 else 60) << 20, 11, quiet)


def _changed(root: Path) -> None:
    change(root, 350, 11, quiet)
