"""The support bundle: what is in it, and that no planted secret and no user's file name is (J13, J19)."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from pathlib import Path

import pytest

from agent.contract import messages as m
from agent.contract.errors import LandfallError
from mgmt import run
from mgmt.bundle import Part, collected, write_bundle
from mgmt.determination import AtomicSet, Policy
from mgmt.inventory import FenceOptions
from mgmt.run import Site
from tests.unit.mgmt_pair import Pair
from tests.unit.test_mgmt_report import statement

CANARY = "canary-4f1c"
NAME = "salaries-of-everybody"


def site_with_secrets(pair: Pair) -> Site:
    """A site with canaries in a fence's command line and in the key file, and with users' file names in policy and statement."""
    (pair.folder / "key").write_text(f"-----BEGIN OPENSSH PRIVATE KEY-----\n{CANARY}\n")
    site = pair.site()
    options = FenceOptions(program=("/usr/local/sbin/fence", f"--password={CANARY}"))
    nodes = tuple(dataclasses.replace(entry, fence="command", fence_options=options) for entry in site.inventory.node)
    site.inventory = dataclasses.replace(site.inventory, node=nodes)
    pair.with_volume(site)
    run.replicate(site, "projects")
    run.set_volume(site, "projects", policy=Policy(atomic_sets=(AtomicSet(NAME, (f"{NAME}/*",)),)), priorities=((NAME, 3),))
    made = statement()
    accounts = tuple(dataclasses.replace(account, paths=(NAME,)) for account in made.accounts)
    site.catalog.add_salvage(dataclasses.replace(made, volume=site.catalog.volume("projects").id, accounts=accounts))
    return site


def unpacked(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive.getmembers()}  # type: ignore[union-attr]


def test_J13_J19_no_secret_and_no_name_of_a_users_file_is_in_a_bundle(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    with site_with_secrets(pair) as site:
        authority = (site.inventory.state_dir / "authority" / "authority.key").read_text().splitlines()[1]
        size = write_bundle(tmp_path / "bundle.tar.gz", collected(site, with_names=False))
        write_bundle(tmp_path / "named.tar.gz", collected(site, with_names=True))
    found = unpacked(tmp_path / "bundle.tar.gz")
    everything = b"".join(found.values())
    assert size == (tmp_path / "bundle.tar.gz").stat().st_size
    assert (tmp_path / "bundle.tar.gz").stat().st_mode & 0o777 == 0o600
    named = b"".join(unpacked(tmp_path / "named.tar.gz").values())
    for secret in (CANARY, authority):
        assert secret.encode() not in everything + named
    assert NAME.encode() not in everything
    assert NAME.encode() in named
    names = {name.removeprefix("landfall-support/") for name in found}
    assert {"about.json", "configuration.json", "check.json", "node-nas1.json", "node-nas2.json", "standing-projects.json"} <= names
    salvage = json.loads(found["landfall-support/salvages-projects.json"])[0]
    assert salvage["files"]["changed"] > 0


def test_a_node_that_does_not_answer_is_in_the_bundle_as_its_error(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    with site_with_secrets(pair) as site:
        pair.nas2.handlers[m.Hello] = _dies
        parts = {part.name: json.loads(part.content) for part in collected(site, with_names=False)}
    assert parts["node-nas2.json"][m.VERB_OF[m.Hello]]["error"]["code"] == "node-unreachable"
    assert parts["node-nas1.json"][m.VERB_OF[m.Hello]]["node"] == "nas1"


def _dies(_: object) -> None:
    raise EOFError


def test_J13_a_bundle_in_which_a_key_would_stand_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(LandfallError):
        write_bundle(tmp_path / "bundle.tar.gz", [Part("x.json", b"-----BEGIN EC PRIVATE KEY-----")])
    assert not (tmp_path / "bundle.tar.gz").exists()
