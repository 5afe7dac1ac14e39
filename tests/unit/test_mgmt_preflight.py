"""`landfall check` against agents that answer by script."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.contract import messages as m
from agent.contract.errors import HostKeyChanged, NoSuchVolume
from agent.system.clock import wall_ns
from mgmt import run
from mgmt.authority import Authority
from mgmt.run import CheckState, Finding
from tests.unit.mgmt_pair import Pair

Answer = Callable[[m.AskHealth], m.Health]


def healthy(clock_s: float = 0.0, **changes: object) -> Answer:
    """Return the answer of a node whose clock is ahead by so much."""

    def answer(_: m.AskHealth) -> m.Health:
        health = m.Health(wall_ns() + int(clock_s * 1e9), 100 << 30, 10 << 30, ("projects",), (m.ExportHealth("SMB"),))
        return dataclasses.replace(health, **changes)  # type: ignore[arg-type]

    return answer


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    made = Pair(tmp_path)
    for agent in (made.nas1, made.nas2):
        agent.handlers[m.AskHealth] = healthy()
        agent.handlers[m.OpenPath] = lambda _: m.Listening("192.0.2.12", 7000)
        agent.handlers[m.TryPath] = lambda _: m.PathTried("192.0.2.11", "eth1", 1500, 0.001, "")
    return made


def checked(pair: Pair, *names: str, oldest_s: float = 3600.0) -> dict[tuple[str, str], Finding]:
    """Return what the check says of a volume that was replicated."""
    with pair.site() as site:
        if not site.catalog.volumes():
            pair.with_volume(site)
            run.replicate(site, "projects")
        found = run.preflight(site, names, oldest_s=oldest_s)
    return {(finding.subject, finding.what): finding for finding in found}


def state(found: dict[tuple[str, str], Finding], subject: str, what: str) -> CheckState:
    finding = found[(subject, what)]
    assert bool(finding.hint) is (finding.state is not CheckState.OK), "everything amiss has a hint"
    return finding.state


def test_a_pair_in_order_has_nothing_but_the_missing_fence_to_say(pair: Pair) -> None:
    found = checked(pair, oldest_s=1e12)
    amiss = {key for key, finding in found.items() if finding.state is not CheckState.OK}
    assert amiss == {("nas1", "release"), ("nas2", "release"), ("nas1", "fence"), ("nas2", "fence")}
    assert run.worst(list(found.values())) is CheckState.WARNING


def test_what_is_amiss_on_a_node_is_said_of_that_node(pair: Pair) -> None:
    pair.nas1.handlers[m.AskHealth] = healthy(clock_s=60.0, exports=(m.ExportHealth("SMB", "smbd does not answer", "serve again"),))
    pair.nas2.handlers[m.AskHealth] = healthy(clock_s=-7200.0, pool_free_bytes=1 << 20, state_free_bytes=100 << 20)
    pair.nas1.handlers[m.TryPath] = lambda _: m.PathTried("", "", 0, 5.0, "no answer")
    pair.nas2.handlers[m.TryPath] = lambda _: m.PathTried("192.0.2.12", "eth1", 9000, 5.0, "")
    found = checked(pair)
    assert state(found, "nas1", "clock") is CheckState.WARNING
    assert state(found, "nas2", "clock") is CheckState.FAILED
    assert state(found, "nas1", "SMB") is CheckState.FAILED
    assert state(found, "nas1", "pool") is CheckState.OK
    assert state(found, "nas2", "pool") is CheckState.FAILED
    assert state(found, "nas2", "state folder") is CheckState.WARNING
    assert state(found, "nas1 to nas2", "network") is CheckState.FAILED
    assert state(found, "nas2 to nas1", "network") is CheckState.OK
    assert state(found, "nas1 and nas2", "MTU") is CheckState.WARNING
    assert state(found, "projects", "replication") is CheckState.WARNING


def test_J1_a_node_that_cannot_be_asked_is_a_failure_and_the_rest_is_checked(pair: Pair) -> None:
    checked(pair)
    pair.nas2.dead = True
    pair.nas1.handlers[m.Hello] = _refuse
    found = checked(pair)
    assert state(found, "nas1", "agent") is CheckState.FAILED
    assert "another key" in found[("nas1", "agent")].said
    assert state(found, "nas2", "agent") is CheckState.FAILED
    assert ("nas1", "clock") not in found
    assert state(found, "nas1", "fence") is CheckState.WARNING


def _refuse(_: object) -> m.NodeFacts:
    raise HostKeyChanged("nas1 shows another key")


def test_a_record_that_cannot_be_read_and_a_copy_that_is_missing_are_failures(pair: Pair) -> None:
    checked(pair)
    pair.nas2.handlers[m.ListVolumes] = lambda _: m.Volumes((), (m.Unreadable(None, "there", "torn"),))
    found = checked(pair)
    assert state(found, "nas2", "records") is CheckState.FAILED
    assert state(found, "projects", "copies") is CheckState.FAILED


def test_J3_an_authority_that_ends_soon_is_said_long_before(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    for days, expected in ((61.0, CheckState.OK), (59.0, CheckState.WARNING), (0.5, CheckState.FAILED)):
        monkeypatch.setattr(Authority, "days_left", days)
        assert state(checked(pair), "management", "certificate authority") is expected


def test_an_unknown_volume_is_refused(pair: Pair) -> None:
    with pytest.raises(NoSuchVolume):
        checked(pair, "nobody")
