"""A volume whose transfer was broken off and resumed, against the digests taken of nas1's frozen generation before it was sent."""

from __future__ import annotations

import json

from testinfra.host import Host

from tests.vm.clients import by_smb, sample
from tests.vm.run import Listing, Run, content


def test_the_drill_found_nothing_amiss(run: Run) -> None:
    assert (run.report["lab"], run.report["serves"], run.report["shortfalls"]) == ("vm", ["nas1"], [])
    assert (run.report["verdict"], run.report["check"]["images_equal"]) == ("resumed", True)
    assert abs(run.report["killed_at"] - run.report["at"]) < 0.1
    assert all(resumed["pieces_skipped"] > 0 for resumed in run.report["resumed"])


def test_nas1_serves_what_it_served(run: Run, served: Listing) -> None:
    assert {path: content(told) for path, told in served.items()} == {path: content(told) for path, told in run.target.items()}


def test_clients_of_smb_read_the_volume_where_it_was(run: Run, mgmt: Host) -> None:
    for path in sample(run, run.target):
        assert by_smb(mgmt, run, path) == run.target[path]["sha256"], path


def test_clients_of_nfs_read_the_volume_where_it_was(run: Run, by_nfs: Listing) -> None:
    assert {path: content(told) for path, told in by_nfs.items()} == {path: content(told) for path, told in run.target.items()}


def test_nobody_took_over(mgmt: Host, run: Run) -> None:
    history = json.loads(mgmt.check_output("landfall history %s --json", run.name))
    assert [found for found in history if found["kind"] == "failover"] == []
