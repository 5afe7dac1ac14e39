"""The recovered volume against the digests that were taken of nas1's frozen generations before nas1 was switched off."""

from __future__ import annotations

from typing import Any

import pytest
from testinfra.host import Host

from tests.vm.run import DIGESTS, Listing, Run, listing

CONTENT = ("kind", "size", "sha256", "sha256_of_blocks", "target", "device")
"""What a file that was kept at its base keeps of it; the rest may be the base's or the target's."""


def content(told: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (told or {}).items() if name in CONTENT}


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
    assert run.report["lab"] == "vm"


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
    plain = [
        path
        for account in run.accounts
        if account["outcome"] == "recovered" and account["kind"] == "regular"
        for path in account["paths"]
        if path.isascii() and path.replace("/", "").replace("-", "").replace(".", "").isalnum() and "sha256" in run.target[path]
    ]
    assert plain
    for path in sorted(plain)[:: max(1, len(plain) // 8)]:
        backslashes = path.replace("/", "\\")
        read = mgmt.check_output("smbclient -N %s -c %s | sha256sum", f"//{run.address}/{run.name}", f'get "{backslashes}" -')
        assert read.split()[0] == run.target[path]["sha256"], path


def test_clients_of_nfs_read_the_recovered_bytes(run: Run, mgmt: Host) -> None:
    """Every recovered file, read by the management node's kernel from where the volume is found."""
    folder = mgmt.check_output("mktemp --directory")
    mgmt.check_output("mount --types nfs4 --options ro,vers=4.2,soft,timeo=600 %s %s", f"{run.address}:{run.mount_point}", folder)
    try:
        read = listing(mgmt.check_output("python3 -c %s %s", DIGESTS.read_text(), folder))
    finally:
        mgmt.check_output("umount %s && rmdir %s", folder, folder)
    recovered = [path for account in run.accounts if account["outcome"] == "recovered" for path in account["paths"]]
    assert recovered
    assert {path: content(read.get(path)) for path in recovered} == {path: content(run.target[path]) for path in recovered}


@pytest.mark.parametrize("word", ["dmi", "arrival"])
def test_the_management_node_keeps_the_evidence(run: Run, mgmt: Host, word: str) -> None:
    assert mgmt.file(f"/var/lib/landfall/mgmt/transfers/{run.statement['transfer']}/{word}").size > 0
