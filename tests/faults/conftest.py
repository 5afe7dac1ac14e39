"""One prepared differential per filesystem, for all fault tests of a run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from agent.contract.identity import FilesystemKind
from mgmt.authority import Authority
from tests.faults import lvm_case
from tests.faults.case import Case, prepare
from tests.faults.lvm_case import LvmCase
from tests.faults.rig import NodeProcess, Pair, Pool, pool

FILES = 300


@contextmanager
def two_pools() -> Iterator[tuple[Pool, Pool]]:
    """Yield two pools, NAS 1's and NAS 2's, gone afterwards. Their paths are short: a socket's address must fit."""
    folder = Path(tempfile.mkdtemp(prefix="lf-"))
    try:
        with ExitStack() as stack:
            yield stack.enter_context(pool(folder / "1")), stack.enter_context(pool(folder / "2"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Return a certificate authority."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def pair(authority: Authority) -> Iterator[Pair]:
    """Yield two agents that run, on pools of their own."""
    with two_pools() as (one, two):
        made = Pair(NodeProcess(one.mount_point / "n", "nas1"), NodeProcess(two.mount_point / "n", "nas2"), authority)
        made.nas1.start()
        made.nas2.start()
        try:
            yield made
        finally:
            made.nas1.kill()
            made.nas2.kill()


@pytest.fixture(scope="session")
def ext4_case(authority: Authority) -> Iterator[Case]:
    """Yield a differential on ext4, on pools of its own."""
    with two_pools() as pools:
        yield prepare(FilesystemKind.EXT4, *pools, authority, files=FILES, seed=11)


@pytest.fixture(scope="session")
def xfs_case(authority: Authority) -> Iterator[Case]:
    """Yield a differential on XFS, on pools of its own."""
    with two_pools() as pools:
        yield prepare(FilesystemKind.XFS, *pools, authority, files=FILES, seed=12)


@contextmanager
def two_groups(substrate: str, authority: Authority) -> Iterator[LvmCase]:
    """Yield a differential on two volume groups, gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="lf-"))
    try:
        made = lvm_case.prepare(substrate, folder, authority)
        yield made
        lvm_case.end(None, made)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def fresh_pair(made: LvmCase) -> Iterator[Pair]:
    """Yield both nodes on volume groups, as they are before the transfer, not running; nothing of them stays."""
    pair = made.fresh()
    try:
        yield pair
    finally:
        lvm_case.end(pair, made)


@pytest.fixture(scope="session")
def thin_case(authority: Authority) -> Iterator[LvmCase]:
    """Yield a differential on thin volumes."""
    with two_groups("lvm-thin", authority) as made:
        yield made


@pytest.fixture(scope="session")
def snapshot_case(authority: Authority) -> Iterator[LvmCase]:
    """Yield a differential on classic snapshots."""
    with two_groups("lvm-snapshot", authority) as made:
        yield made


@pytest.fixture
def thin_pair(thin_case: LvmCase) -> Iterator[Pair]:
    """Yield both nodes of ``thin_case``."""
    with fresh_pair(thin_case) as pair:
        yield pair


@pytest.fixture
def snapshot_pair(snapshot_case: LvmCase) -> Iterator[Pair]:
    """Yield both nodes of ``snapshot_case``."""
    with fresh_pair(snapshot_case) as pair:
        yield pair


@pytest.fixture(params=["thin", "snapshot"])
def group_case(request: pytest.FixtureRequest) -> LvmCase:
    """Return a differential on each substrate of LVM's in turn."""
    found: LvmCase = request.getfixturevalue(f"{request.param}_case")
    return found


@pytest.fixture
def group_pair(group_case: LvmCase) -> Iterator[Pair]:
    """Yield both nodes of ``group_case``."""
    with fresh_pair(group_case) as pair:
        yield pair


@pytest.fixture(params=[FilesystemKind.EXT4, FilesystemKind.XFS], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    """Return a differential on each filesystem in turn."""
    found: Case = request.getfixturevalue(f"{request.param}_case")
    return found
