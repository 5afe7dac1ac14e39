"""`landfall losses`: the kept loss statements searched, also of a volume that is gone, and how far back a salvage put things."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.contract.errors import NoSuchVolume
from agent.contract.messages import Outcome
from mgmt import run
from mgmt.catalog import Catalog
from mgmt.cli import landfall
from mgmt.cli.place import Place
from mgmt.losses import losses, rpo_of
from mgmt.view import to_html
from tests.unit.mgmt_pair import Pair
from tests.unit.test_mgmt_report import statement

HOUR_NS = 3600 * 10**9


def test_the_rpo_of_recovered_files_is_the_targets_and_of_the_others_the_bases() -> None:
    made = statement()
    around = dataclasses.replace(made.circumstances, at_ns=10 * HOUR_NS)
    timed = dataclasses.replace(made, circumstances=around, base_taken_ns=4 * HOUR_NS, target_taken_ns=9 * HOUR_NS)
    assert (rpo_of(timed).recovered_s, rpo_of(timed).others_s) == (3600.0, 6 * 3600.0)
    assert rpo_of(dataclasses.replace(timed, base_taken_ns=0)).others_s is None
    assert "1.0 h for recovered files, 6.0 h for the others" in to_html(timed)


def test_only_what_lies_below_the_path_is_found_and_only_what_was_lost_has_an_age() -> None:
    made = statement()
    found = losses([(made, False)])
    assert {loss.account.outcome for loss in found} == {Outcome.ABSENT, Outcome.KEPT, Outcome.HELD}
    assert all(loss.change_age_s is not None for loss in found)
    assert [loss.account.paths for loss in losses([(made, True)], "new")] == [("new",)]
    assert losses([(made, False)], "ne") == []
    (renamed,) = losses([(made, False)], "/former/", with_recovered=True)
    assert renamed.account.paths == ("renamed",)
    assert renamed.change_age_s is None


def test_statements_of_a_volume_that_was_removed_are_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(tmp_path)

    @contextmanager
    def site(_: Place) -> Iterator[run.Site]:
        with pair.site() as opened:
            yield opened

    monkeypatch.setattr(Place, "site", site)
    made = statement()
    with pair.site() as opened:
        opened.catalog.add_salvage(made)
    name = made.volume_name
    done = CliRunner().invoke(landfall, ["losses", name, "--under", "new", "--json"])
    assert done.exit_code == 0, done.output
    (loss,) = json.loads(done.stdout)
    assert (loss["account"]["outcome"], loss["operator"]) == ("absent", made.circumstances.operator)
    assert "root@mgmt" in CliRunner().invoke(landfall, ["losses", name]).output
    assert made.volume_name in CliRunner().invoke(landfall, ["statement", name]).output
    with pytest.raises(NoSuchVolume):
        Catalog(tmp_path / "state" / "catalog.sqlite").statements("nobody")
