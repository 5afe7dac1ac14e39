"""The management node against real agents in a lab: replicate, lose the primary, salvage, undo, resume, and the pinned host key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from agent.contract import messages as m
from agent.contract.errors import HostKeyChanged, NodeUnreachable, NoSuchTransfer, PrimaryAlive
from agent.contract.identity import FilesystemKind
from agent.system.run import run as start_program
from mgmt import run
from mgmt.inventory import Inventory, read_inventory
from mgmt.lab import lifecycle
from mgmt.lab.enrolment import KeyPair
from mgmt.lab.layout import Lab, NodeName
from mgmt.lab.namespace import within
from mgmt.report import LossStatement

MGMT, NAS1, NAS2 = NodeName
VOLUME_BYTES = 192 << 20
XFS_BYTES = 320 << 20  # mkfs.xfs makes none below 300 MiB
FILES = 60
LIMIT_S = 60.0

WRITE = """
import pathlib, sys, json
root = pathlib.Path(sys.argv[1])
for name, seed, size in json.load(sys.stdin):
    import random
    (root / name).write_bytes(random.Random(seed).randbytes(size))
import os; os.sync()
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="landfall-mgmt-", dir="/var/tmp") as folder:
        made = Lab.at(Path(folder) / "lab")
        try:
            lifecycle.up(made, pool_size_bytes=2 << 30)
            yield made
        finally:
            lifecycle.down(made)


def inventory_of(lab: Lab) -> Inventory:
    return dataclasses.replace(read_inventory(lab.node(MGMT) / "etc" / "landfall.toml"), silence_limit_s=3.0)


def program(lab: Lab, node: NodeName, argv: list[str], stdin: bytes = b"") -> str:
    return start_program(lifecycle.inside(lab, node, argv), stdin=stdin).text


def write(lab: Lab, root: str, files: dict[str, tuple[int, int]]) -> None:
    """Give each file the content that follows from its seed and size."""
    listed = [(name, seed, size) for name, (seed, size) in files.items()]
    program(lab, NAS1, [sys.executable, "-c", WRITE, root], json.dumps(listed).encode())


def digest(seed: int, size: int) -> str:
    return hashlib.sha256(random.Random(seed).randbytes(size)).hexdigest()


def digests(lab: Lab, node: NodeName, root: str) -> dict[str, str]:
    """Return what a program of the system reads there."""
    output = program(lab, node, ["sh", "-c", 'cd "$1" && find . -type f -exec sha256sum {} +', "sh", root])
    return {line[66:].removeprefix("./"): line[:64] for line in output.splitlines()}


@pytest.mark.parametrize("filesystem", FilesystemKind)
def test_A_the_primary_dies_in_the_middle_and_every_whole_file_is_recovered(lab: Lab, filesystem: FilesystemKind) -> None:
    name = f"v-{filesystem}"
    reached_half = threading.Event()
    died: list[str] = []
    sent: list[UUID] = []
    base = {f"old{number}": (number, 30_000) for number in range(FILES)}
    changed = {f"old{number}": (1000 + number, 10_000 + 3000 * number) for number in range(0, FILES, 2)}
    changed |= {f"new{number}": (2000 + number, 5000 + 4000 * number) for number in range(FILES)}

    def prepare() -> str:
        with run.Site(inventory_of(lab)) as site:
            size = XFS_BYTES if filesystem is FilesystemKind.XFS else VOLUME_BYTES
            return run.add_volume(site, name, filesystem=filesystem, size_bytes=size, primary=NAS1, secondary=NAS2).mount_point

    def first() -> run.Replicated:
        with run.Site(inventory_of(lab)) as site:
            return run.replicate(site, name)

    def prepared() -> run.Prepared:
        with run.Site(inventory_of(lab)) as site:
            ready = run.prepare(site, name, differential=m.Differential.SEND)
            assert all(found.id != ready.transfer for found in site.node(NAS2).ask(m.ListTransfers()).transfers)
            return ready

    def second() -> None:
        def tell(node: str, progress: m.Progress) -> None:
            if progress.step == "pieces" and progress.done * 2 >= progress.total:
                reached_half.set()

        try:
            with run.Site(inventory_of(lab)) as site:
                run.replicate(
                    site,
                    name,
                    differential=m.Differential.SEND,
                    rate_limit_bytes_s=2 << 20,
                    tell=tell,
                    on_order=lambda transfer, _: sent.append(transfer),
                )
        except NodeUnreachable as error:
            died.append(error.code)
        finally:
            reached_half.set()

    def recover() -> tuple[LossStatement, str]:
        with run.Site(inventory_of(lab)) as site:
            (facts,) = (found for found in site.node(NAS2).ask(m.ListTransfers()).transfers if found.volume == site.catalog.volume(name).id)
            run.wait_for_failure(site, NAS2, facts.id, LIMIT_S)
            statement = run.salvage_volume(site, name)
            assert statement
            assert statement.generation
            return statement, site.node(NAS2).ask(m.OpenGeneration(statement.generation)).path

    def undo_and_resume(statement: LossStatement) -> tuple[run.Replicated, str]:
        with run.Site(inventory_of(lab)) as site:
            assert statement.generation
            site.node(NAS2).ask(m.CloseGeneration(statement.generation))
            run.undo(site, name)
            with pytest.raises(PrimaryAlive):
                run.salvage_volume(site, name)
            done = run.replicate(site, name, differential=m.Differential.SEND)
            with pytest.raises(NoSuchTransfer):
                run.verdicts(site, name)
            return done, site.node(NAS2).ask(m.OpenGeneration(done.target)).path

    inside = lab.namespace(MGMT)
    root = within(inside, prepare)
    write(lab, root, base)
    assert not within(inside, first).resumed
    write(lab, root, changed)
    ready = within(inside, prepared)
    write(lab, root, {"written after the generation": (1, 1000)})
    going = threading.Thread(target=within, args=(inside, second))
    going.start()
    assert reached_half.wait(LIMIT_S)
    lifecycle.kill(lab, NAS1)
    going.join(LIMIT_S)
    assert died == ["node-unreachable"]
    assert sent == [ready.transfer]

    statement, opened = within(inside, recover)
    verdict = {account.paths[0]: account.outcome for account in statement.accounts}
    found = digests(lab, NAS2, opened)
    assert {file for file in changed if file not in verdict} == set()
    assert "written after the generation" not in verdict
    for file, (seed, size) in changed.items():
        match verdict[file]:
            case m.Outcome.RECOVERED:
                assert found[file] == digest(seed, size), file
            case m.Outcome.KEPT:
                assert found[file] == digest(*base[file]), file
            case m.Outcome.ABSENT:
                assert file not in found, file
            case other:
                pytest.fail(f"{file} is {other}")
    assert {file: found[file] for file in base if file not in changed} == {
        file: digest(*base[file]) for file in base if file not in changed
    }
    counted = [verdict[file] for file in changed]
    assert 0 < counted.count(m.Outcome.RECOVERED) < len(changed)

    lifecycle.start_node(lab, NAS1)
    done, opened = within(inside, lambda: undo_and_resume(statement))
    assert done.resumed
    assert done.sent.pieces_skipped > 0
    assert digests(lab, NAS2, opened) == {file: digest(seed, size) for file, (seed, size) in {**base, **changed}.items()}


def test_J1_a_node_with_another_host_key_is_not_spoken_to(lab: Lab) -> None:
    inventory = inventory_of(lab)
    other = tuple(dataclasses.replace(entry, host_key=KeyPair.generate().public) for entry in inventory.node)

    def ask() -> None:
        with run.Site(dataclasses.replace(inventory, node=other)) as site, pytest.raises(HostKeyChanged):
            site.hello(NAS2)

    within(lab.namespace(MGMT), ask)


def test_the_command_line_enters_the_labs_network(lab: Lab) -> None:
    argv = [sys.executable, "-m", "mgmt.cli", "--lab", str(lab.directory), "volume", "list", "--json"]
    assert isinstance(json.loads(start_program(argv).text), list)
