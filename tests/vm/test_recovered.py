"""The recovered volume against the digests that were taken of nas1's frozen generations before nas1 was switched off."""

from __future__ import annotations

import json
from typing import Any

import pytest
from testinfra.host import Host

from tests.vm.clients import by_smb, sample
from tests.vm.run import Listing, Run, content


def base_path(account: dict[str, Any]) -> str:
    return str((account["base_paths"] or account["paths"])[0])


def ancestors(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def test_the_drill_found_nothing_amiss(run: Run) -> None:
    check = run.report["check"]
    assert {name: check[name] for name in ("false_recovered", "missed", "untouched_differ", "unlisted_blocks")} == {
        "false_recovered": 0,
        "missed": 0,
        "untouched_differ": 0,
        "unlisted_blocks": 0,
    }
    assert abs(run.report["killed_at"] - run.report["at"]) < 0.1
    assert (run.report["lab"], run.report["serves"], run.report["shortfalls"]) == ("vm", ["nas2"], [])


def test_the_statement_names_every_changed_file_once_and_its_totals_are_right(run: Run) -> None:
    totals = run.statement["files"]
    outcomes = [account["outcome"] for account in run.accounts]
    assert totals == {**{name: outcomes.count(name) for name in totals if name != "changed"}, "changed": len(outcomes)}
    assert 0 < totals["recovered"] < totals["changed"]
    assert totals["damaged"] == 0


def test_every_recovered_file_is_the_targets(run: Run, served: Listing) -> None:
    recovered = [path for account in run.accounts if account["outcome"] == "recovered" for path in account["paths"]]
    assert recovered
    assert {path: served.get(path) for path in recovered} == {path: run.target[path] for path in recovered}


def test_every_file_that_is_not_recovered_is_where_and_what_the_statement_says(run: Run, served: Listing) -> None:
    wrong = []
    moved = {account["found_at"] for account in run.accounts if account["found_at"]}
    for account in run.accounts:
        places = [account["found_at"]] if account["found_at"] else account["paths"]
        match account["outcome"]:
            case "kept_at_base":
                wrong += [path for path in places if content(served.get(path)) != content(run.base[base_path(account)])]
            case "absent":
                # A file of the base that it would have replaced may be there, or one that had to make way.
                wrong += [path for path in account["paths"] if path in served and path not in run.base and path not in moved]
            case "deleted":
                wrong += [path for path in account["paths"] if path in served and path not in run.target]
            case "held":
                held = content(run.base[base_path(account)])
                wrong += [] if any(content(served.get(path)) == held for path in places) else [places[0]]
    assert wrong == []


def test_nothing_else_changed(run: Run, served: Listing) -> None:
    named = {path for account in run.accounts for path in account["paths"]}
    untouched = run.target.keys() - named
    assert {path: served.get(path) for path in untouched} == {path: run.target[path] for path in untouched}


def test_nothing_is_there_that_neither_generation_had(run: Run, served: Listing) -> None:
    kept = [account for account in run.accounts if account["outcome"] in {"held", "kept_at_base"}]
    places = {path for account in kept for path in [account["found_at"] or account["paths"][0], *account["paths"]]}
    absent = {
        path for account in run.accounts if account["outcome"] == "absent" for path in account["paths"]
    }  # what they would have replaced
    expected = run.target.keys() | places | absent | {above for path in places for above in ancestors(path)}
    assert served.keys() - expected == set()


def test_clients_of_smb_read_the_recovered_bytes(run: Run, mgmt: Host) -> None:
    """From the management node, another machine than the one that serves, and where they found the volume before."""
    found = [path for account in run.accounts if account["outcome"] == "recovered" for path in account["paths"]]
    for path in sample(run, found):
        assert by_smb(mgmt, run, path) == run.target[path]["sha256"], path


def test_clients_of_nfs_read_the_recovered_bytes(run: Run, by_nfs: Listing) -> None:
    found = [path for account in run.accounts if account["outcome"] == "recovered" for path in account["paths"]]
    assert found
    assert {path: content(by_nfs.get(path)) for path in found} == {path: content(run.target[path]) for path in found}


@pytest.mark.parametrize("word", ["dmi", "arrival"])
def test_the_management_node_keeps_the_evidence(run: Run, mgmt: Host, word: str) -> None:
    assert mgmt.file(f"/var/lib/landfall/mgmt/transfers/{run.statement['transfer']}/{word}").size > 0


def test_nobody_took_over_before_an_operator_had_said_that_nas1_cannot_write(mgmt: Host, run: Run) -> None:
    (took,) = [found for found in json.loads(mgmt.check_output("landfall history %s --json", run.name)) if found["kind"] == "failover"]
    facts = took["facts"]
    assert (facts["source"], facts["target"], facts["epoch"]) == ("nas1", "nas2", run.epoch)
    assert (facts["fence"], facts["split_brain"]) == ("manual", False)
    assert facts["proof"]
    assert facts["operator"].startswith("root@")
