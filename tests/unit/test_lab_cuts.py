"""The ports' states, held against what a bridge does with them."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from mgmt.lab.cli import lab
from mgmt.lab.cuts import Pair, Port, pair, ports, read_cuts, write_cuts
from mgmt.lab.layout import NodeName

PAIRS = [pair(one, other) for one, other in combinations(NodeName, 2)]


def exchanges(one: Port, other: Port) -> bool:
    """What the bridge does: no packet through a port that is down, none between two isolated ones."""
    return Port.DOWN not in {one, other} and {one, other} != {Port.ISOLATED}


@given(st.frozensets(st.sampled_from(PAIRS)))
def test_exactly_the_cut_pairs_exchange_nothing(cut: frozenset[Pair]) -> None:
    state = ports(cut)
    for candidate in PAIRS:
        one, other = candidate
        assert exchanges(state[one], state[other]) == (candidate not in cut)


@given(st.frozensets(st.sampled_from(PAIRS)))
def test_the_record_of_cuts_reads_back(tmp_path_factory: pytest.TempPathFactory, cut: frozenset[Pair]) -> None:
    path = tmp_path_factory.mktemp("cuts") / "cuts.json"
    write_cuts(path, cut)
    assert read_cuts(path) == cut


def test_without_a_record_nothing_is_cut(tmp_path: Path) -> None:
    assert read_cuts(tmp_path / "cuts.json") == frozenset()


def test_a_node_cannot_be_cut_from_itself() -> None:
    with pytest.raises(ValueError, match="itself"):
        pair(NodeName.NAS1, NodeName.NAS1)


@pytest.mark.parametrize("command", ["cut", "heal"])
def test_a_link_with_one_end_is_a_wrong_command_line(tmp_path: Path, command: str) -> None:
    result = CliRunner().invoke(lab, [command, "nas1", "nas1", "--dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "two ends" in result.output
