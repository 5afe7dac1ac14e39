"""What the benchmarks say of their figures: goals, gross regressions, the page, and the ideal order that ours is measured by."""

from __future__ import annotations

import argparse
import itertools
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from tests.bench import page
from tests.bench.bench_order import ideal_order, whole_at
from tests.bench.harness import Figure, keep, machine, turn
from tests.unit.dmi_samples import sample_dmi


@dataclass(frozen=True)
class Nothing:
    per_s: dict[str, list[float]]
    depth: int = 32


@pytest.mark.parametrize(
    ("value", "more_is_better", "missed_by"), [(2.0, True, 0.0), (0.5, True, 0.5), (0.5, False, 0.0), (1.5, False, 0.5)]
)
def test_a_goal_is_a_bound_and_the_miss_a_share_of_it(value: float, more_is_better: bool, missed_by: float) -> None:
    figure = Figure("of something", value, 1.0, more_is_better=more_is_better)
    assert figure.met == (missed_by == 0.0)
    assert figure.missed_by == pytest.approx(missed_by)


@pytest.mark.parametrize(("short", "value", "status"), [(True, 0.3, 1), (True, 0.5, 0), (False, 0.3, 0)])
def test_only_the_short_form_fails_and_only_for_a_gross_regression(tmp_path: Path, short: bool, value: float, status: int) -> None:
    asked = argparse.Namespace(folder=tmp_path, short=short)
    assert keep(asked, "scattered", Nothing({}), [Figure("a ratio", value, 0.9, gross=0.4)], machine()) == status
    assert json.loads((tmp_path / "scattered.json").read_text())["figures"][0]["goal"] == (None if short else 0.9)


def test_the_page_is_whole_and_needs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = argparse.Namespace(folder=tmp_path, short=False)
    figures = [Figure("a & b", 0.45, 0.9, why="too few cores"), Figure("c", 1.0, 0.9, why="met, so nobody asks")]
    keep(asked, "scattered", Nothing({"<ours>": [1.0, 2.0], "theirs": [3.0]}), figures, machine())
    assert page.main(["--folder", str(tmp_path)]) == 0
    text = (tmp_path / "index.html").read_text()
    assert "missed by 50%" in text
    assert "too few cores" in text
    assert "nobody asks" not in text
    assert "a &amp; b" in text
    assert "http" not in text.replace("http-equiv", "")
    ElementTree.fromstring(text[text.index("<svg") : text.rindex("</svg>") + 6])
    assert "index.html" in capsys.readouterr().out


def test_everybody_is_first_once() -> None:
    assert {turn(["a", "b", "c"], number)[0] for number in range(3)} == {"a", "b", "c"}


def test_no_order_has_more_whole_files_early_than_the_ideal() -> None:
    """The second and third file share a piece: of the third only one block is missing once the second is whole."""
    dmi = replace(sample_dmi(), need_start=np.array([0, 1, 2, 4, 4], "<u8"), need=np.array([3, 0, 0, 2], "<u4"))
    size = dmi.block_count.astype(np.int64)
    best = whole_at(dmi, size, ideal_order(dmi, size))
    assert best.tolist() == [0, 1, 2, 5]
    assert all((whole_at(dmi, size, np.array(order)) >= best).all() for order in itertools.permutations(range(4)))
