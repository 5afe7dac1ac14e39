"""A node that is taken out of the configuration is out at once: nothing is asked of it, and no pass is issued for it."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

import pytest
from cryptography import x509

from agent.contract.errors import ConfigInvalid
from mgmt import run
from mgmt.authority import CLOCKS_DIFFER, LIFETIME, Authority
from mgmt.run import Site
from tests.unit.mgmt_pair import Pair


def test_J5_a_revoked_node_takes_part_in_nothing_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(tmp_path)
    with pair.site() as site:
        pair.with_volume(site)
        run.replicate(site, "projects")
        inventory = dataclasses.replace(site.inventory, node=tuple(entry for entry in site.inventory.node if entry.name != "nas2"))
    asked = len(pair.nas2.asked)
    monkeypatch.setattr(Authority, "passes", lambda *_: pytest.fail("a pass was issued"))
    with Site(inventory, {"nas1": pair.nas1.node}) as site:
        for operation in (run.replicate, run.prepare, run.verdicts, run.verify, run.undo):
            with pytest.raises(ConfigInvalid, match="nas2"):
                operation(site, "projects")
    assert len(pair.nas2.asked) == asked


def test_J5_a_pass_that_was_issued_before_is_worth_nothing_soon(tmp_path: Path) -> None:
    issued = Authority(tmp_path / "authority").passes("nas1", "nas2")
    for side in (issued.sender, issued.receiver):
        certificate = x509.load_pem_x509_certificate(side.certificate_pem.encode())
        assert certificate.not_valid_after_utc - certificate.not_valid_before_utc == LIFETIME + CLOCKS_DIFFER
        assert certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC) <= datetime.timedelta(hours=24)
