"""Upkeep in a lab: copies compared and mended, records that cannot be read."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from agent.contract import messages as m
from agent.contract.errors import NoSuchGeneration, NotOurs, NotTogether, RequestRefused, VolumeExists
from agent.contract.identity import BLOCK_BYTES, FilesystemKind, GenerationId
from agent.system.run import run as start_program
from mgmt import run
from mgmt.authority import Authority, Passes
from mgmt.inventory import Inventory, read_inventory
from mgmt.lab import lifecycle
from mgmt.lab.layout import Lab, NodeName
from mgmt.lab.namespace import within

MGMT, NAS1, NAS2 = NodeName
SIZES = {FilesystemKind.EXT4: 64 << 20, FilesystemKind.XFS: 320 << 20}  # mkfs.xfs makes none below 300 MiB
T = TypeVar("T")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="landfall-upkeep-", dir="/var/tmp") as folder:
        made = Lab.at(Path(folder) / "lab")
        try:
            lifecycle.up(made, pool_size_bytes=2 << 30)
            yield made
        finally:
            lifecycle.down(made)


def inventory_of(lab: Lab) -> Inventory:
    return dataclasses.replace(read_inventory(lab.node(MGMT) / "etc" / "landfall.toml"), silence_limit_s=3.0)


def managed(lab: Lab, act: Callable[[run.Site], T]) -> T:
    """Return what ``act`` returns on the management node."""

    def inside() -> T:
        with run.Site(inventory_of(lab)) as site:
            return act(site)

    return within(lab.namespace(MGMT), inside)


def made(lab: Lab, name: str, filesystem: FilesystemKind = FilesystemKind.EXT4) -> Path:
    """Make a volume; return where NAS 1's files are, as this process can reach them."""
    facts = managed(
        lab,
        lambda site: run.add_volume(site, name, filesystem=filesystem, size_bytes=SIZES[filesystem], primary=NAS1, secondary=NAS2),
    )
    return Path(facts.mount_point)


def write(lab: Lab, root: Path, name: str, content: bytes) -> None:
    script = "import os,sys; open(sys.argv[1],'wb').write(sys.stdin.buffer.read()); os.sync()"
    start_program(lifecycle.inside(lab, NAS1, [sys.executable, "-c", script, str(root / name)]), stdin=content)


def replicated(lab: Lab, name: str) -> GenerationId:
    return managed(lab, lambda site: run.replicate(site, name)).target


def image(generation: GenerationId) -> str:
    """Where a node has the image of a generation; nobody but its own programs sees that folder."""
    return f"/run/landfall/node/pool/volumes/{generation.volume}/generations/{generation.name}.img"


@contextlib.contextmanager
def frozen(lab: Lab, root: Path) -> Iterator[None]:
    """Hold still the filesystem of a volume's files: a mounted one writes to its image by itself, long after its last client did."""
    start_program(lifecycle.inside(lab, NAS1, ["fsfreeze", "--freeze", str(root)]))
    try:
        yield
    finally:
        start_program(lifecycle.inside(lab, NAS1, ["fsfreeze", "--unfreeze", str(root)]))


def digest(lab: Lab, node: NodeName, path: str) -> str:
    return start_program(lifecycle.inside(lab, node, ["sha256sum", path])).text


ROT = """
import os, sys
path, secretly = sys.argv[1], sys.argv[2] == "secretly"
about = os.stat(path)
with open(path, "r+b") as file:
    at = file.read().find(sys.stdin.buffer.read())
    assert at >= 0 and at % 4096 == 0, at
    file.seek(at + 1000)
    byte = file.read(1)[0]
    file.seek(at + 1000)
    file.write(bytes([byte ^ 0x40]))
    file.flush()
    os.fsync(file.fileno())
if secretly:
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
print(at // 4096)
"""


def rot(lab: Lab, node: NodeName, generation: GenerationId, content: bytes, how: str = "secretly") -> int:
    """Flip a byte of the block that begins with ``content``, as a disk does: no time stamp tells of it. Return the block."""
    argv = [sys.executable, "-c", ROT, image(generation), how]
    return int(start_program(lifecycle.inside(lab, node, argv), stdin=content).text)


def tear(lab: Lab, node: NodeName, path: str) -> None:
    """Cut a file short; what it was is beside it."""
    start_program(lifecycle.inside(lab, node, ["cp", "-a", path, f"{path}.whole"]))
    start_program(lifecycle.inside(lab, node, ["truncate", "-s", "20", path]))


def command(lab: Lab, *words: str, expect: int = 0) -> str:
    """Return what ``landfall`` prints."""
    argv = [sys.executable, "-m", "mgmt.cli", "--lab", str(lab.directory), *words]
    return start_program(argv, ok=(expect,), timeout_s=120.0).text


@pytest.mark.parametrize(("filesystem", "node"), [(FilesystemKind.EXT4, NAS2), (FilesystemKind.XFS, NAS1)])
def test_E13_rot_outside_any_differential_is_found_named_and_mended(lab: Lab, filesystem: FilesystemKind, node: NodeName) -> None:
    name = f"rot-{filesystem}-{node}"
    root = made(lab, name, filesystem)
    victim, other = os.urandom(3 * BLOCK_BYTES), os.urandom(2 * BLOCK_BYTES)
    write(lab, root, "victim", victim)
    replicated(lab, name)
    write(lab, root, "other", other)
    newest = replicated(lab, name)
    assert managed(lab, lambda site: run.verify(site, name)).clean

    block = rot(lab, node, newest, victim)
    operational = str(Path(image(newest)).parents[1] / "operational.img")
    with frozen(lab, root):
        before = digest(lab, NAS1, operational)
        found = json.loads(command(lab, "verify", name, "--json", expect=90))
        (damage,) = found["damage"]
        assert not found["clean"]
        assert (damage["node"], damage["runs"]) == (node, [[block, 1]])
        assert [file["paths"] for file in damage["owners"]["files"]] == [["victim"]]
        assert found["written"] == []

        healed = managed(lab, lambda site: run.verify(site, name, heal=True))
        assert healed.clean
        assert healed.damage[0].mended
        assert 0 < healed.bytes_sent < 64 << 10, "a mend sends the damaged blocks and no more"
        assert managed(lab, lambda site: run.verify(site, name)).damage == ()
        assert digest(lab, NAS1, operational) == before
    write(lab, root, "after", b"a mended base is a base")
    replicated(lab, name)
    assert managed(lab, lambda site: run.verify(site, name)).clean


def test_F2_a_secondary_that_somebody_wrote_to_is_told_apart_from_rot(lab: Lab) -> None:
    root = made(lab, "written")
    content = os.urandom(BLOCK_BYTES)
    write(lab, root, "file", content)
    newest = replicated(lab, "written")
    rot(lab, NAS2, newest, content, "openly")
    found = managed(lab, lambda site: run.verify(site, "written"))
    assert [node for node, _ in found.written] == [NAS2]
    assert [damage.node for damage in found.damage] == [NAS2]
    assert managed(lab, lambda site: run.verify(site, "written", heal=True)).clean
    assert managed(lab, lambda site: run.verify(site, "written")).written == ()


def test_B14_without_a_digest_table_nobody_guesses_whose_copy_is_right(lab: Lab) -> None:
    root = made(lab, "unknown")
    content = os.urandom(BLOCK_BYTES)
    write(lab, root, "file", content)
    newest = replicated(lab, "unknown")
    tables = f"/run/landfall/node/pool/state/differential/{newest.volume}"
    start_program(lifecycle.inside(lab, NAS1, ["rm", f"{tables}/{newest.name}.digests"]))
    rot(lab, NAS2, newest, content)
    found = managed(lab, lambda site: run.verify(site, "unknown", heal=True))
    assert [(damage.node, damage.mended) for damage in found.damage] == [("", False)]
    assert not found.clean
    assert managed(lab, lambda site: run.verify(site, "unknown", heal=True, trust=NAS1)).clean
    assert managed(lab, lambda site: run.verify(site, "unknown")).damage == ()


def test_a_generation_that_is_not_on_both_is_refused(lab: Lab) -> None:
    made(lab, "never")
    with pytest.raises(NoSuchGeneration):
        managed(lab, lambda site: run.verify(site, "never"))
    with pytest.raises(RequestRefused):
        managed(lab, lambda site: run.verify(site, "never", trust="nas3"))


def test_B12_one_record_that_cannot_be_read_is_told_and_hides_nothing(lab: Lab) -> None:
    root, _ = made(lab, "readable"), made(lab, "other")
    write(lab, root, "file", b"content")
    older, newest = replicated(lab, "readable"), replicated(lab, "readable")
    record = image(older).replace(".img", ".json")
    tear(lab, NAS2, record)
    (told,) = json.loads(command(lab, "status", "readable", "--json"))
    assert [found["where"] for found in told["secondary"]["unreadable"]] == [record]
    assert [facts["id"]["counter"] for facts in told["secondary"]["facts"]["generations"]] == [0, newest.counter]
    assert record in command(lab, "status", "readable")
    (other,) = json.loads(command(lab, "status", "other", "--json"))
    assert other["secondary"]["unreadable"] == []
    replicated(lab, "readable")
    replicated(lab, "other")
    about = str(Path(record).parents[1] / "volume.json")
    tear(lab, NAS2, about)
    (told,) = json.loads(command(lab, "status", "readable", "--json"))
    assert told["secondary"]["facts"] is None
    assert "cannot be read" in told["secondary"]["problem"]
    replicated(lab, "other")
    for path in (record, about):
        start_program(lifecycle.inside(lab, NAS2, ["mv", f"{path}.whole", path]))
    replicated(lab, "readable")


def test_check_says_ok_of_a_lab_in_order_and_fails_with_its_node(lab: Lab) -> None:
    made(lab, "checked")
    replicated(lab, "checked")
    found = json.loads(command(lab, "check", "checked", "--json"))
    amiss = {(said["subject"], said["what"]): said["said"] for said in found["findings"] if said["state"] != "OK"}
    assert set(amiss) <= {(NAS1, "fence"), (NAS2, "fence"), (NAS1, "clock"), (NAS2, "clock")}, amiss
    ways = [said["said"] for said in found["findings"] if said["what"] == "network"]
    assert len(ways) == 2
    assert all("MTU 1500" in said for said in ways)
    assert "checked" in next(said["said"] for said in found["findings"] if said["what"] == "SMB")
    lifecycle.kill(lab, NAS2)
    try:
        found = json.loads(command(lab, "check", "--json", expect=91))
        assert [said["subject"] for said in found["findings"] if said["state"] == "FAILED"] == [NAS2]
    finally:
        lifecycle.start_node(lab, NAS2)


def test_a_volume_is_removed_from_both_nodes_and_not_while_it_is_used(lab: Lab) -> None:
    root = made(lab, "ending")
    write(lab, root, "file", b"content")
    newest = replicated(lab, "ending")
    assert "unserve" in command(lab, "volume", "remove", "ending", "--yes", "--json", expect=25)
    command(lab, "unserve", "ending")
    assert (
        "--yes"
        in start_program(
            [sys.executable, "-m", "mgmt.cli", "--lab", str(lab.directory), "volume", "remove", "ending"], ok=(2,)
        ).stderr.decode()
    )
    command(lab, "replicate", "ending", "--prepare")
    assert "discard" in command(lab, "volume", "remove", "ending", "--yes", "--json", expect=36)
    command(lab, "discard", "ending", "--yes")
    assert json.loads(command(lab, "volume", "remove", "ending", "--yes", "--json"))["id"] == str(newest.volume)
    assert "ending" not in command(lab, "volume", "list")
    for node in (NAS1, NAS2):
        start_program(lifecycle.inside(lab, node, ["ls", str(Path(image(newest)).parents[1])]), ok=(2,))
        listing = start_program(lifecycle.inside(lab, node, ["find", "/run/landfall/node", "-name", f"*{newest.volume}*"])).text
        assert listing == ""
    made(lab, "ending")
    replicated(lab, "ending")


def may_grow_mounted_ext4() -> bool:
    """Whether this process has CAP_SYS_RESOURCE, bit 24."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) >> 24 & 1)


@pytest.mark.parametrize("filesystem", FilesystemKind)
def test_E20_a_volume_grows_under_its_clients_and_the_next_differential_has_the_base_it_had(lab: Lab, filesystem: FilesystemKind) -> None:
    name = f"grown-{filesystem}"
    root, small = made(lab, name, filesystem), SIZES[filesystem]
    write(lab, root, "before", os.urandom(8 << 20))
    first = replicated(lab, name)
    large, room = small + (64 << 20), ["df", "-B1", "--output=size", str(root)]
    before = int(start_program(lifecycle.inside(lab, NAS1, room)).text.split()[-1])
    assert "does not shrink" in command(lab, "volume", "grow", name, "--size", str(small - (1 << 20)), "--json", expect=27)
    grow = ("volume", "grow", name, "--size", str(large), "--json")
    if filesystem is FilesystemKind.EXT4 and not may_grow_mounted_ext4():
        assert "unserve" in command(lab, *grow, expect=50)
        command(lab, "unserve", name)
        assert json.loads(command(lab, *grow))["size_bytes"] == large
        command(lab, "serve", name, "--node", NAS1)
    else:
        assert json.loads(command(lab, *grow))["size_bytes"] == large
    assert int(start_program(lifecycle.inside(lab, NAS1, room)).text.split()[-1]) > before + (48 << 20)
    content = os.urandom(1 << 20)
    write(lab, root, "filler", bytes(small // 2))
    for number in range(4):
        write(lab, root, f"after {number}", content)
    done = managed(lab, lambda site: run.replicate(site, name))
    assert done.base == first, "growing costs no full replication"
    assert managed(lab, lambda site: run.verify(site, name)).clean
    opened = managed(lab, lambda site: site.node(NAS2).ask(m.OpenGeneration(done.target)).path)
    try:
        assert digest(lab, NAS2, f"{opened}/after 3").split()[0] == hashlib.sha256(content).hexdigest()
    finally:
        managed(lab, lambda site: site.node(NAS2).ask(m.CloseGeneration(done.target)))
    if filesystem is FilesystemKind.XFS:
        command(lab, *grow)


EXISTING = """
import os, subprocess, sys
image, root = sys.argv[1], sys.argv[1] + ".root"
with open(image, "wb") as file:
    file.truncate(64 << 20)
os.mkdir(root)
with open(root + "/kept", "wb") as file:
    file.write(b"for years" * 100_000)
subprocess.run(["mkfs.ext4", "-q", "-b", "4096", "-d", root, image], check=True)
"""


def test_an_existing_filesystem_becomes_a_volume_without_a_copy(lab: Lab) -> None:
    image = "/run/landfall/node/pool/old.img"
    start_program(lifecycle.inside(lab, NAS1, [sys.executable, "-c", EXISTING, image]))
    about = start_program(lifecycle.inside(lab, NAS1, ["stat", "-c", "%i %b", image])).text.split()
    order = ("volume", "adopt", "existing", image, "--keep", "last=3")
    command(lab, *order, expect=2)  # nobody said yes
    command(lab, "volume", "adopt", "existing", "/run/landfall/node/pool/none.img", "--yes", expect=NotOurs.exit_code)
    assert [entry.name for entry in managed(lab, run.list_volumes) if entry.name == "existing"] == []
    facts = json.loads(command(lab, *order, "--yes", "--json"))
    assert json.loads(command(lab, *order, "--yes", "--json"))["id"] == facts["id"], "said twice, done once"
    there = f"/run/landfall/node/pool/volumes/{facts['id']}/operational.img"
    assert start_program(lifecycle.inside(lab, NAS1, ["stat", "-c", "%i", there])).text.split() == about[:1]
    kept = digest(lab, NAS1, f"{facts['mount_point']}/kept").split()[0]
    assert kept == hashlib.sha256(b"for years" * 100_000).hexdigest()
    target = replicated(lab, "existing")
    assert managed(lab, lambda site: run.verify(site, "existing")).clean
    opened = managed(lab, lambda site: site.node(NAS2).ask(m.OpenGeneration(target)).path)
    try:
        assert digest(lab, NAS2, f"{opened}/kept").split()[0] == kept
    finally:
        managed(lab, lambda site: site.node(NAS2).ask(m.CloseGeneration(target)))
    listed = {entry.name: entry for entry in managed(lab, run.list_volumes)}
    assert (listed["existing"].size_bytes, listed["existing"].keep.last) == (64 << 20, 3)
    command(lab, "volume", "adopt", "existing", image, "--primary", "nas2", "--secondary", "nas1", "--yes", expect=VolumeExists.exit_code)


def test_volumes_are_replicated_as_of_one_moment(lab: Lab) -> None:
    roots = {name: made(lab, name) for name in ("first", "second")}
    for name, root in roots.items():
        write(lab, root, "file", name.encode() * 10_000)
    order = ("replicate", "first", "second", "--together", "--json")
    command(lab, "replicate", "first", "second", expect=2)
    ready = json.loads(command(lab, *order, "--prepare"))
    assert [member["volume"] for member in ready["members"]] == ["first", "second"]
    assert ready["frozen_ms"] > 0

    # One of them arrives by itself; the same order brings the other, of the same moment.
    alone = replicated(lab, "first")
    assert alone.name == managed(lab, lambda site: site.catalog.transfers(alone.volume))[0].target.name
    rest = json.loads(command(lab, *order))
    assert (rest["moment_ns"], rest["frozen_ms"]) == (ready["moment_ns"], 0)
    assert [member["prepared"] is None for member in rest["members"]] == [True, False]
    assert len(rest["replicated"]) == 1
    assert [member["target"] for member in rest["members"]] == [member["target"] for member in ready["members"]]
    again = json.loads(command(lab, *order))
    assert again["moment_ns"] > ready["moment_ns"]
    assert len(again["replicated"]) == 2
    for name in roots:
        assert json.loads(command(lab, "verify", name, "--json"))["clean"]
        said = json.loads(command(lab, "history", name, "--kind", "together", "--json"))
        assert "was frozen together with" in said[-1]["sentence"]

    command(lab, "replicate", "first", "--prepare")
    before = managed(lab, lambda site: [len(facts.generations) for facts in site.node(NAS1).ask(m.ListVolumes()).volumes])
    command(lab, *order, expect=NotTogether.exit_code)
    command(lab, "replicate", "first", "first", "--together", expect=NotTogether.exit_code)
    command(lab, "replicate", "first", "--together", expect=NotTogether.exit_code)
    managed(
        lab,
        lambda site: run.add_volume(site, "elsewhere", filesystem=FilesystemKind.EXT4, size_bytes=64 << 20, primary=NAS2, secondary=NAS1),
    )
    command(lab, "replicate", "second", "elsewhere", "--together", expect=NotTogether.exit_code)
    after = managed(lab, lambda site: [len(facts.generations) for facts in site.node(NAS1).ask(m.ListVolumes()).volumes])
    assert sorted(after) == sorted([*before, 1]), "what is refused takes nothing"
    replicated(lab, "first")
    command(lab, *order)

    # The service does the same by the schedule of one, and goes on with a set of which one has arrived.
    command(lab, "volume", "set", "first", "--schedule", "*:*:*", "--together", "pair")
    command(lab, "volume", "set", "second", "--together", "pair")
    moments = [newest_moments(lab)]
    for begin in ((), ("--prepare",)):
        if begin:
            command(lab, *order, *begin)
            replicated(lab, "first")
        command(lab, "watch", "--once")
        moments.append(newest_moments(lab))
    assert all(len(moment) == 1 for moment in moments), "both are of one moment"
    assert sorted(moments, key=min) == moments
    assert len({min(moment) for moment in moments}) == 3
    said = [json.loads(command(lab, "history", name, "--kind", "cycle", "--json")) for name in roots]
    for entries, other in zip(said, ("second", "first"), strict=True):
        assert any(f", together with {other}" in entry["sentence"] for entry in entries)
    assert "replicated g" in said[1][-1]["sentence"]
    command(lab, "volume", "set", "first", "--schedule", "", "--together", "")
    assert json.loads(command(lab, "volume", "set", "second", "--together", "", "--json"))["together"] == ""


def newest_moments(lab: Lab) -> set[int]:
    """Return when the newest generations that nas2 has of two volumes were taken."""

    def asked(site: run.Site) -> set[int]:
        held = {facts.name: facts for facts in site.node(NAS2).ask(m.ListVolumes()).volumes}
        return {m.newest(held[name].generations).taken_ns for name in ("first", "second")}

    return managed(lab, asked)


FILES = """
import os, sys
os.chdir(sys.argv[1])
os.makedirs("folder/below")
os.chmod("folder", 0o2750)
open("folder/below/file", "w").write("first")
with open("folder/sparse", "wb") as file:
    file.truncate(1 << 20)
    file.seek(1 << 19)
    file.write(b"data")
os.symlink("/etc/passwd", "folder/link")
os.mkfifo("folder/fifo")
os.setxattr("folder/below/file", "user.tag", b"kept")
os.chown("folder/below/file", 1234, 2345)
os.utime("folder/below/file", ns=(1, 1_000_000_007))
open("alone", "w").write("first")
os.sync()
"""
SPOIL = """
import os, shutil, sys
os.chdir(sys.argv[1])
shutil.rmtree("folder")
open("alone", "w").write("second")
os.mkdir("outside")
os.symlink("outside", "folder")
os.sync()
"""
STATE = """
import os, sys
os.chdir(sys.argv[1])
for root, folders, files in os.walk("."):
    for name in sorted(folders + files):
        path = os.path.join(root, name)
        about = os.lstat(path)
        link = os.readlink(path) if os.path.islink(path) else ""
        tag = os.getxattr(path, "user.tag").decode() if "user.tag" in os.listxattr(path, follow_symlinks=False) else ""
        print(path, oct(about.st_mode), about.st_uid, about.st_gid, about.st_mtime_ns if name == "file" else "", link, tag, sep="|")
"""


def test_single_files_come_back_to_the_side_and_in_place_and_nowhere_else(lab: Lab) -> None:
    root = made(lab, "single")

    def program(script: str, folder: Path = root) -> list[str]:
        return start_program(lifecycle.inside(lab, NAS1, [sys.executable, "-c", script, str(folder)])).text.splitlines()

    program(FILES)
    before = {line for line in program(STATE) if "lost+found" not in line}
    generation = replicated(lab, "single").name
    program(SPOIL)
    aside = ("restore", "single", "--generation", generation, "--json")
    done = json.loads(command(lab, *aside, "folder", "alone", "nobody", expect=92))
    assert (done["files"], [refused["path"] for refused in done["refused"]]) == (5, ["nobody"])
    assert set(program(STATE, root / ".landfall-restored" / generation)) == before
    assert start_program(lifecycle.inside(lab, NAS1, ["cat", str(root / "alone")])).text == "second"

    # What is a link in the volume now leads nowhere: neither a parent nor the folder to put things in may be one.
    done = json.loads(command(lab, *aside, "--in-place", "--yes", "folder/below/file", "folder", expect=92))
    whole = {line.split("|")[0][2:] for line in before if line.startswith("./folder")}
    assert (done["files"], {refused["path"] for refused in done["refused"]}) == (0, whole)
    assert json.loads(command(lab, *aside, "--to", "folder", "alone", expect=92))["files"] == 0
    assert start_program(lifecycle.inside(lab, NAS1, ["find", str(root / "outside"), "-mindepth", "1"])).text == ""
    for path in ("../alone", "/etc/passwd", "folder/../../x", ""):
        command(lab, *aside, "--", path, expect=53)

    command(lab, *aside, "--in-place", "--yes", "alone")
    assert start_program(lifecycle.inside(lab, NAS1, ["cat", str(root / "alone")])).text == "first"
    start_program(lifecycle.inside(lab, NAS1, ["rm", str(root / "folder")]))
    command(lab, *aside, "--in-place", "--yes", "folder/below/file")
    assert {line for line in program(STATE) if line.startswith(("./folder|", "./folder/below"))} == {
        line for line in before if line.startswith(("./folder|", "./folder/below"))
    }
    command(lab, "restore", "single", "--generation", "g9", "alone", expect=33)
    command(lab, "restore", "single", "--generation", generation, "--node", NAS2, "alone", expect=25)


def test_J13_no_key_and_no_token_is_in_a_command_line_a_log_or_a_bundle(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    made(lab, "secretive")
    secrets: set[bytes] = set()
    seen: set[bytes] = set()
    issue = Authority.passes

    def passes(authority: Authority, sender: str, receiver: str) -> Passes:
        issued = issue(authority, sender, receiver)
        secrets.update(side.key_pem.splitlines()[1].encode() for side in (issued.sender, issued.receiver))
        secrets.add(issued.token.encode())
        return issued

    def look(*_: object) -> None:
        for process in Path("/proc").glob("[0-9]*"):
            for file in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    seen.add((process / file).read_bytes())

    monkeypatch.setattr(Authority, "passes", passes)
    managed(lab, lambda site: run.replicate(site, "secretive", tell=look, on_order=look))
    for path in lab.node(MGMT).rglob("*"):
        if path.is_file() and b"PRIVATE KEY-----" in (content := path.read_bytes()):
            secrets.add(content.splitlines()[1])
    assert len(secrets) >= 5, "two keys of the transfer, its token, the authority's and an SSH key"
    bundle = lab.directory / "bundle.tar.gz"
    listed = json.loads(command(lab, "support-bundle", "--output", str(bundle), "--json"))
    assert "node-nas1.json" in {part["name"] for part in listed["parts"]}
    with tarfile.open(bundle) as archive:
        seen |= {file.read() for member in archive.getmembers() if (file := archive.extractfile(member))}
    for node in (MGMT, NAS1, NAS2):
        seen |= {path.read_bytes() for path in (lab.node(node) / "log").rglob("*") if path.is_file()}
    assert not [secret for secret in secrets if any(secret in text for text in seen)]
