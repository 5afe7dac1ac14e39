"""Tenures and leases by a clock of the test's own: what a boot forgets, what an end outlives."""

from __future__ import annotations

import stat
from pathlib import Path
from uuid import uuid4

import pytest

from agent.config import read_config
from agent.contract.errors import ConfigInvalid
from agent.serving import tenure as tenures
from agent.serving.tenure import Tenure, Tenures, is_over, remaining_s
from agent.system.files import locked

S = 1_000_000_000


@pytest.fixture
def held(tmp_path: Path) -> Tenures:
    return Tenures(tmp_path / "tenure")


def test_I4_a_volume_is_given_up_the_margin_before_its_lease_ends() -> None:
    leased = Tenure(uuid4(), "v", 1, "boot", lease_until_ns=100 * S)
    assert [is_over(leased, now * S, 10.0) for now in (0, 89, 90, 100, 10**6)] == [False, False, True, True, True]
    assert [remaining_s(leased, now * S) for now in (0, 99, 100, 200)] == [100.0, 1.0, 0.0, 0.0]
    without = Tenure(uuid4(), "v", 1, "boot")
    assert not is_over(without, 1 << 62, 10.0)
    assert remaining_s(without, 0) is None


def test_I3_what_another_boot_confirmed_counts_for_nothing(held: Tenures, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = uuid4()
    held.confirm(volume, "v", 3, None)
    assert (held.of(volume) or Tenure(volume, "", 0, "")).confirmed
    monkeypatch.setattr(tenures, "boot_id", lambda: "another")
    assert held.of(volume) is None
    assert held.all() == ()


def test_an_end_stands_until_the_next_order_to_serve_and_takes_the_address_with_it(held: Tenures) -> None:
    volume = uuid4()
    held.confirm(volume, "v", 3, 50 * S)
    held.have_address(volume, "v", 3, "10.77.0.100/24")
    leased = held.lease(volume, "v", 3, 90 * S)
    assert held.ended(leased) is None
    held.mark_ended(leased, "late")
    renewed = held.lease(volume, "v", 3, 900 * S)
    assert held.ended(renewed) is not None, "a renewal that comes too late does not undo the end"
    assert Tenures(held._folder).ended(renewed) is not None, "nor does a restart of the agent"
    again = held.confirm(volume, "v", 3, None)
    assert held.ended(again) is None
    assert (again.address, again.lease_until_ns, again.confirmed) == ("", None, True)


def test_an_end_is_of_one_epoch(held: Tenures) -> None:
    volume = uuid4()
    held.mark_ended(held.confirm(volume, "v", 3, 50 * S), "late")
    following = held.have_address(volume, "v", 5, "10.77.0.100/24")
    assert held.ended(following) is None
    assert not following.confirmed


def test_an_address_that_is_taken_before_serving_stays(held: Tenures) -> None:
    volume = uuid4()
    held.have_address(volume, "v", 2, "fd77::100/64")
    assert held.confirm(volume, "v", 2, None).address == "fd77::100/64"


def test_only_the_first_rest_counts_until_it_is_served_again(held: Tenures) -> None:
    volume = uuid4()
    held.rest(volume, 1)
    assert held.of(volume) is None
    held.confirm(volume, "v", 2, None)
    held.rest(volume, 5)
    held.rest(volume, 6)
    assert (held.of(volume) or Tenure(volume, "", 0, "")).rests_after == 5
    assert held.confirm(volume, "v", 2, None).rests_after is None


@pytest.mark.parametrize(("margin", "lab", "fits"), [(10.0, False, True), (9.9, False, False), (2.0, True, True), (0.1, True, False)])
def test_a_margin_that_is_too_short_is_refused(tmp_path: Path, margin: float, lab: bool, fits: bool) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f'node = "nas1"\nreplication_address = "192.0.2.1"\nlab = {str(lab).lower()}\nlease_margin_s = {margin}\n')
    if fits:
        assert read_config(path).lease_margin_s == margin
    else:
        with pytest.raises(ConfigInvalid, match="lease_margin_s"):
            read_config(path)


def test_J15_nobody_else_reads_or_plants_what_says_who_may_serve(held: Tenures, tmp_path: Path) -> None:
    volume = uuid4()
    held.mark_ended(held.confirm(volume, "v", 1, None), "late")
    folder = tmp_path / "tenure"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    (folder / "hands").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), locked(folder / "hands", wait_s=0.0):
        pass
    assert not (tmp_path / "elsewhere").exists()
    (folder / f"{uuid4()}.json").write_text('{"volume": 1}')
    assert [found.volume for found in held.all()] == [volume]
