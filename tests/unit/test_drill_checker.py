"""The checker's own readers, held against what the contract writes; and its rules on trees that exist in memory only."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from agent.contract import arrival as contract_arrival
from mgmt.drill.checker.blocks import Arrival, read_arrival
from mgmt.drill.checker.loss import read_loss
from mgmt.drill.checker.trees import Node, Tree
from mgmt.drill.checker.verdict import Evidence, Verdict, judge

GOLDEN = Path(__file__).parent / "golden"
EMPTY = np.zeros(0, np.int64)


def record(tmp_path: Path, dmi: Path, pieces: int, batches: list[tuple[list[int], list[int]]], tail: bytes = b"") -> Path:
    raw = dmi.read_bytes()
    sections = int.from_bytes(raw[12:16], "little")
    identity = raw[24 + 64 * sections :][:16]
    written = contract_arrival.encode_head(UUID(int=7), identity, pieces)
    for sequence, (rows, bits) in enumerate(batches):
        written += contract_arrival.encode_batch(sequence, np.array(rows, np.uint32), np.array(bits, np.uint8))
    path = tmp_path / "arrival"
    path.write_bytes(written + tail)
    return path


def golden_dmi() -> tuple[Path, Any]:
    from agent.contract.dmi import Dmi

    path = GOLDEN / "sample.dmi"
    return path, Dmi.decode(path.read_bytes())


def test_the_readers_agree_with_the_contract(tmp_path: Path) -> None:
    path, dmi = golden_dmi()
    pieces = dmi.piece_total
    assert pieces >= 2
    batches = [([0, 1], [1, 3]), ([0], [3]), ([1], [7])]
    found = read_arrival(path, record(tmp_path, path, pieces, batches, tail=b"BTCH\5\0\0\0"))
    assert found.first.tolist() == dmi.op_block.tolist()
    assert found.count.tolist() == dmi.block_count.tolist()
    assert found.arrived.tolist() == [True] + [False] * (pieces - 1)
    first, count = int(dmi.op_block[0]), int(dmi.block_count[0])
    assert found.piece_of(np.array([first, first + count - 1])).tolist() == [0, 0]
    if first:
        assert found.piece_of(np.array([first - 1])).tolist() == [-1]


def test_a_record_of_another_transfer_and_a_DMI_that_is_cut_are_refused(tmp_path: Path) -> None:
    path, dmi = golden_dmi()
    with pytest.raises(ValueError, match="another DMI"):
        read_arrival(path, record(tmp_path, path, dmi.piece_total + 1, []))
    cut = tmp_path / "cut"
    cut.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="whole DMI"):
        read_arrival(cut, record(tmp_path, path, dmi.piece_total, []))


# Rules, on trees in memory.


def file(inode: int, content: bytes = b"a", *, generation: int = 1, kind: int = stat.S_IFREG, mtime: int = 1, mode: int = 0o644) -> Node:
    return Node(inode, f"{inode}.{generation}".encode(), kind, mode, 0, 0, len(content), mtime, 0, content, (), 0, 0)


def folder(inode: int, mtime: int = 1) -> Node:
    return file(inode, b"", kind=stat.S_IFDIR, mtime=mtime)


def tree(nodes: dict[bytes, Node]) -> Tree:
    nodes = {b"": folder(2), **nodes}
    links: dict[int, list[bytes]] = {}
    known: dict[bytes, list[bytes]] = {}
    for path, node in nodes.items():
        if not node.is_directory:
            links.setdefault(node.inode, []).append(path)
        known.setdefault(node.identity, []).append(path)
    return Tree(
        nodes,
        {inode: tuple(sorted(paths)) for inode, paths in links.items()},
        {key: tuple(sorted(paths)) for key, paths in known.items()},
        0,
    )


def verdict(
    tmp_path: Path,
    base: dict[bytes, Node],
    target: dict[bytes, Node],
    result: dict[bytes, Node],
    rows: Iterable[dict[str, Any]],
    *,
    deletions: str = "hold",
    arrived: bool = True,
) -> Verdict:
    path = tmp_path / "loss.json"
    path.write_text(json.dumps({"files": list(rows), "deletions": deletions}))
    regular = {node.inode: np.array([node.inode]) for node in target.values() if node.kind == stat.S_IFREG}
    differing = np.array(sorted(regular), dtype=np.int64)
    pieces = Arrival(differing, np.ones(len(differing), np.int64), np.full(len(differing), arrived))
    return judge(Evidence(tree(base), tree(target), tree(result), differing, regular, pieces), read_loss(path))


def figures(found: Verdict) -> dict[str, int]:
    return {name: count for name, count in found.counts.items() if count}


OLD, NEW = file(10, b"old"), file(11, b"new!", generation=5)


def test_a_swap_of_which_one_half_arrived_keeps_base_content_under_its_new_name(tmp_path: Path) -> None:
    first, second = file(20, b"first"), file(21, b"second")
    base, target = {b"a": first, b"b": second}, {b"a": second, b"b": replace(first, content=b"FIRST", mtime_ns=9)}
    rows = [{"paths": ["a"], "outcome": "recovered"}, {"paths": ["b"], "base_paths": ["a"], "outcome": "kept_at_base"}]
    assert figures(verdict(tmp_path, base, target, {b"a": second, b"b": first}, rows, arrived=False)) == {}
    assert figures(verdict(tmp_path, base, target, {b"a": second, b"b": first}, rows)) == {"missed": 1}
    assert "false_recovered" in figures(verdict(tmp_path, base, target, {b"a": first, b"b": second}, rows, arrived=False))


@pytest.mark.parametrize("deletions", ["hold", "apply"])
def test_a_new_file_that_did_not_arrive_leaves_what_it_would_have_replaced(tmp_path: Path, deletions: str) -> None:
    rows = [{"paths": ["p"], "outcome": "absent"}, {"paths": ["p"], "outcome": "held"}]
    base, target = {b"p": OLD}, {b"p": NEW}
    assert figures(verdict(tmp_path, base, target, {b"p": OLD}, rows, deletions=deletions, arrived=False)) == {}
    assert figures(verdict(tmp_path, base, target, {}, rows, deletions=deletions, arrived=False)) == {"untouched_differ": 2 - 1}
    mixture = file(11, b"nld!")
    assert figures(verdict(tmp_path, base, target, {b"p": mixture}, rows, deletions=deletions, arrived=False))["false_recovered"] == 1


def test_a_held_file_whose_directory_was_renamed_is_found_there(tmp_path: Path) -> None:
    base = {b"d": folder(3), b"d/gone": OLD, b"x": file(12)}
    target = {b"e": folder(3, mtime=7), b"x": file(12, b"changed")}
    rows = [{"paths": ["e"], "outcome": "recovered"}, {"paths": ["d/gone"], "outcome": "held"}, {"paths": ["x"], "outcome": "kept_at_base"}]
    assert figures(verdict(tmp_path, base, target, {b"e": folder(3), b"e/gone": OLD, b"x": file(12)}, rows, arrived=False)) == {}
    assert figures(verdict(tmp_path, base, target, {b"e": folder(3), b"x": file(12)}, rows, arrived=False))["untouched_differ"] == 1


def test_what_a_renamed_directory_holds_need_not_be_named_but_must_be_there(tmp_path: Path) -> None:
    base, target = {b"d": folder(3), b"d/f": OLD}, {b"e": folder(3), b"e/f": OLD}
    rows = [{"paths": ["e"], "outcome": "recovered"}]
    assert figures(verdict(tmp_path, base, target, target, rows)) == {}
    assert figures(verdict(tmp_path, base, target, {b"e": folder(3)}, rows)) == {"untouched_differ": 1}


def test_a_directorys_time_is_promised_unless_a_member_is_not_what_the_target_has(tmp_path: Path) -> None:
    base = {b"d": folder(3), b"d/f": file(12)}
    target = {b"d": folder(3, mtime=7), b"d/f": file(12, b"more"), b"d/g": NEW}
    late = {**target, b"d": folder(3, mtime=8)}
    rows = [{"paths": [name], "outcome": "recovered"} for name in ("d", "d/f", "d/g")]
    assert figures(verdict(tmp_path, base, target, late, rows)) == {"false_recovered": 1}
    rows[2]["outcome"] = "absent"
    del late[b"d/g"]
    assert figures(verdict(tmp_path, base, target, late, rows)) == {"missed": 1}


def test_deletions_of_a_whole_salvage_are_applied_though_the_policy_holds(tmp_path: Path) -> None:
    rows = [{"paths": ["gone"], "outcome": "deleted"}]
    assert figures(verdict(tmp_path, {b"gone": OLD}, {}, {}, rows)) == {}
    assert figures(verdict(tmp_path, {b"gone": OLD}, {}, {b"gone": OLD}, rows)) == {"untouched_differ": 1}


def test_a_reused_inode_number_is_another_file(tmp_path: Path) -> None:
    again = file(10, b"old", generation=2)
    rows = [{"paths": ["p"], "outcome": "recovered"}]
    assert figures(verdict(tmp_path, {b"p": OLD}, {b"p": again}, {b"p": again}, rows))["false_recovered"] == 1
    both = [*rows, {"paths": ["p"], "outcome": "deleted"}]
    assert figures(verdict(tmp_path, {b"p": OLD}, {b"p": again}, {b"p": again}, both)) == {}


def test_a_statement_that_names_what_is_not_one_file_is_false(tmp_path: Path) -> None:
    rows = [{"paths": ["p", "q"], "outcome": "recovered"}, {"paths": ["q"], "outcome": "recovered"}]
    nodes = {b"p": OLD, b"q": NEW}
    assert figures(verdict(tmp_path, {}, nodes, nodes, rows))["false_recovered"] >= 1
    wrong = [{"paths": ["p"], "outcome": "recovered", "inode": 99}]
    assert figures(verdict(tmp_path, {}, {b"p": OLD}, {b"p": OLD}, wrong)) == {"false_recovered": 1}


@pytest.mark.parametrize("text", ["{}", "[]", '{"files": [{"paths": []}], "deletions": "hold"}', '{"files": [], "deletions": "both"}',
                                  '{"files": [{"outcome": "fine"}], "deletions": "hold"}', "no JSON"])  # fmt: skip
def test_a_loss_statement_that_lacks_something_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "loss.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"."):
        read_loss(path)
