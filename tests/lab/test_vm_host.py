"""The VM lab's host: libvirt's daemons in namespaces of their own; what the lab's scripts refuse, mend and remove. No machine is booted."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("libvirtd", "virsh", "vagrant", "qemu-system-x86_64", "dnsmasq", "iptables")
LIMIT_S = 60.0

pytestmark = [
    pytest.mark.skipif(Path("/run/systemd/system").is_dir(), reason="systemd runs libvirtd here, and that one is not the tests'"),
    pytest.mark.skipif(
        not all(shutil.which(program) for program in PROGRAMS), reason="libvirt is not installed; run packaging/setup.sh --vm"
    ),
]


@dataclass(frozen=True, slots=True)
class Checkout:
    """A copy of the scripts with a build/vm of its own, so with daemons and namespaces of its own."""

    folder: Path

    @property
    def made(self) -> Path:
        return self.folder / "build" / "vm"

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/bash", f"vagrant/{script}", *arguments],
            check=False,
            cwd=self.folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=600,
        )

    def virsh(self, *arguments: str) -> str:
        result = self.run("host", "run", "virsh", "--quiet", *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def processes(self) -> set[int]:
        """Returns the processes that see this checkout's settings as /etc/libvirt."""
        settings = self.made / "host" / "etc"
        found = set()
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and (entry / "root/etc/libvirt").samefile(settings):
                    found.add(int(entry.name))
            except OSError:
                continue
        return found

    def define_machine(self, name: str, description: str) -> None:
        definition = self.folder / "machine.xml"
        definition.write_text(
            f"<domain type='qemu'><name>{name}</name><description>{description}</description><memory>65536</memory>"
            "<os><type>hvm</type></os></domain>"
        )
        self.virsh("define", str(definition))


def network_of(process: Path) -> str | None:
    """Returns the network namespace of a process; none of one that has ended."""
    try:
        return os.readlink(process / "ns" / "net")
    except OSError:
        return None


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    shutil.copytree(ROOT / "vagrant", tmp_path / "vagrant")
    shutil.copy(ROOT / "Vagrantfile", tmp_path)
    made = Checkout(tmp_path)
    yield made
    made.run("host", "down")
    assert made.processes() == set()


@pytest.fixture
def up(checkout: Checkout) -> Checkout:
    result = checkout.run("host", "up")
    assert result.returncode == 0, result.stderr
    return checkout


def give_box(checkout: Checkout) -> None:
    """A box in name and form, of what vagrant/box would make it of, without what makes it boot."""
    stamp = checkout.run("box", "--stamp")
    assert stamp.returncode == 0, stamp.stderr
    (checkout.made / "box.stamp").write_text(f"trixie\n{stamp.stdout}")
    (checkout.made / "vmlinuz").write_bytes(b"no kernel")
    (checkout.made / "initrd").write_bytes(b"no initrd")
    parts = {"metadata.json": '{"provider": "libvirt", "format": "qcow2", "virtual_size": 4}', "Vagrantfile": "", "box.img": ""}
    with tarfile.open(checkout.made / "landfall.box", "w") as archive:
        for name, text in parts.items():
            (checkout.folder / "part").write_text(text)
            archive.add(checkout.folder / "part", name)


def give_program(checkout: Checkout, name: str, script: str) -> str:
    """Returns a PATH on which a program is the given shell script."""
    programs = checkout.folder / "programs"
    programs.mkdir(exist_ok=True)
    (programs / name).write_text(f"#!/bin/bash\n{script}\n")
    (programs / name).chmod(0o755)
    return f"{programs}:{os.environ['PATH']}"


def give_vagrant(checkout: Checkout, script: str) -> str:
    """Returns a PATH on which `vagrant` is the given shell script; `vagrant box add` succeeds."""
    return give_program(checkout, "vagrant", f'[ "$1" = up ] || exit 0\n{script}')


def test_vagrant_takes_the_vagrantfile(checkout: Checkout) -> None:
    assert checkout.run("box", "--stamp").returncode == 0, "makes the key that the Vagrantfile names"
    homes = {"VAGRANT_HOME": str(checkout.folder / "home"), "VAGRANT_DOTFILE_PATH": str(checkout.folder / "state")}
    result = subprocess.run(
        ["vagrant", "validate"], check=False, cwd=checkout.folder, env={**os.environ, **homes}, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_daemons_live_in_namespaces_of_their_own_and_leave_nothing(checkout: Checkout) -> None:
    settings = Path("/etc/libvirt/qemu.conf").read_bytes()
    state = sorted(Path("/var/lib/libvirt").rglob("*"))
    assert checkout.run("host", "up").returncode == 0
    assert checkout.run("host", "up").returncode == 0, "a second time changes nothing"
    assert checkout.virsh("uri").strip() == "qemu:///system"
    links = checkout.run("host", "run", "ip", "-brief", "link").stdout.split("\n")
    assert [line.split()[0] for line in links if line] == ["lo"]
    assert checkout.run("host", "run", "bash", "-c", "pwd; exit 7").returncode == 7
    assert checkout.run("host", "run", "pwd").stdout.strip() == str(checkout.folder)
    started = checkout.processes()
    assert len(started) >= 2
    networks = {os.readlink(f"/proc/{process}/ns/net") for process in started}
    assert len(networks) == 1
    assert networks != {os.readlink("/proc/self/ns/net")}
    assert checkout.run("host", "down").returncode == 0
    assert not networks & {network for entry in Path("/proc").glob("[0-9]*") if (network := network_of(entry))}
    assert not (checkout.made / "host").exists()
    assert Path("/etc/libvirt/qemu.conf").read_bytes() == settings
    assert sorted(Path("/var/lib/libvirt").rglob("*")) == state


def test_one_labs_end_leaves_the_others_running(up: Checkout, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = Checkout(tmp_path_factory.mktemp("other"))
    shutil.copytree(ROOT / "vagrant", other.folder / "vagrant")
    try:
        assert other.run("host", "up").returncode == 0
        other.define_machine("landfall-nas1", "the other lab's")
    finally:
        assert other.run("lab", "down").returncode == 5, "a stranger's machine stands in the way of `lab down`"
        assert other.run("host", "down").returncode == 0
    assert up.virsh("list", "--all", "--name").strip() == ""


def test_dead_daemon_is_started_again(up: Checkout) -> None:
    process = int((up.made / "host" / "run" / "libvirtd.pid").read_text())
    assert process in up.processes()
    daemon = os.pidfd_open(process)
    try:
        os.kill(process, 9)
        assert select.select([daemon], [], [], LIMIT_S)[0]
    finally:
        os.close(daemon)
    assert up.run("host", "up").returncode == 0
    assert up.virsh("list", "--all", "--name").strip() == ""


@pytest.mark.parametrize("verb", ["up", "down"])
def test_machine_without_the_labs_marker_is_never_touched(up: Checkout, verb: str) -> None:
    up.define_machine("landfall-nas1", "somebody's work")
    before = up.virsh("dumpxml", "landfall-nas1")
    result = up.run("lab", verb)
    assert result.returncode == 5
    assert "landfall-nas1" in result.stderr
    assert "not touched" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert up.virsh("dumpxml", "landfall-nas1") == before


@pytest.mark.parametrize("verb", ["up", "down"])
def test_network_and_pool_without_the_labs_marker_are_never_touched(up: Checkout, verb: str) -> None:
    definition = up.folder / "network.xml"
    definition.write_text("<network><name>landfall-lab</name><ip address='10.99.0.1' netmask='255.255.255.0'/></network>")
    up.virsh("net-define", str(definition))
    result = up.run("lab", verb)
    assert (result.returncode, len(result.stderr.splitlines())) == (5, 1), result.stderr
    assert "10.99.0.1" in up.virsh("net-dumpxml", "landfall-lab")
    up.virsh("net-undefine", "landfall-lab")
    (up.folder / "elsewhere").mkdir()
    up.virsh("pool-define-as", "landfall-lab", "dir", "--target", str(up.folder / "elsewhere"))
    result = up.run("lab", verb)
    assert (result.returncode, len(result.stderr.splitlines())) == (5, 1), result.stderr
    assert "elsewhere" in up.virsh("pool-dumpxml", "landfall-lab")


@pytest.mark.timeout(900)
def test_machines_that_do_not_come_up_in_time_end_the_up_and_the_next_one_destroys_them_first(checkout: Checkout) -> None:
    """What an interrupted `up` leaves is a machine with the lab's marker and no stamp that it was finished."""
    give_box(checkout)
    half = checkout.folder / "half.xml"
    half.write_text(
        f"<domain type='qemu'><name>landfall-mgmt</name><description>landfall-lab {checkout.folder}</description>"
        "<memory>65536</memory><os><type>hvm</type></os></domain>"
    )
    path = give_vagrant(checkout, f"virsh --quiet define {half}; sleep 600")
    first = checkout.run("lab", "up", PATH=path, LANDFALL_UP_LIMIT_S="10")
    assert first.returncode == 8, first.stderr
    assert "did not come up within 10 s" in first.stderr
    assert checkout.virsh("list", "--all", "--name").split() == ["landfall-mgmt"]
    networks = checkout.virsh("net-list", "--name").split()
    assert sorted(networks) == ["landfall-lab", "landfall-mgmt"]

    (checkout.folder / "programs" / "vagrant").write_text('#!/bin/bash\n[ "$1" = up ] || exit 0\nvirsh --quiet list --all --name; exit 9\n')
    second = checkout.run("lab", "up", PATH=path)
    assert second.returncode == 1, second.stderr
    assert "interrupted" in second.stderr
    assert "landfall-mgmt" not in (checkout.made / "up.log").read_text(), "vagrant saw the half made machine"

    assert checkout.run("lab", "down").returncode == 0
    assert checkout.processes() == set()
    left = {entry.name for entry in checkout.made.iterdir()}
    assert not left & {"host", "pool", "console", "vagrant-state", "inventory.yml", "known_hosts", "ssh_config", "up.stamp"}


def test_a_machine_that_does_not_answer_over_ssh_is_named_with_where_its_words_are(checkout: Checkout) -> None:
    give_box(checkout)
    domain = f"<description>landfall-lab {checkout.folder}</description><memory>65536</memory><os><type>hvm</type></os></domain>"
    for name in ("mgmt", "nas1", "nas2"):
        (checkout.folder / f"{name}.xml").write_text(f"<domain type='qemu'><name>landfall-{name}</name>{domain}")
    path = give_vagrant(checkout, f"for name in mgmt nas1 nas2; do virsh --quiet define {checkout.folder}/$name.xml; done")
    result = checkout.run("lab", "up", PATH=path, LANDFALL_START_LIMIT_S="1")
    assert result.returncode == 8, result.stderr
    assert "mgmt does not answer over SSH within 1 s; build/vm/console/mgmt.log" in result.stderr.replace(f"{checkout.folder}/", "")
    assert not (checkout.made / "up.stamp").exists(), "the next `up` begins anew"
    assert checkout.run("lab", "down").returncode == 0
    assert checkout.processes() == set()


def test_a_box_that_vagrant_does_not_take_is_named_and_left_alone(checkout: Checkout) -> None:
    give_box(checkout)
    before = (checkout.made / "landfall.box").read_bytes()
    path = give_program(checkout, "vagrant", 'echo "The box is corrupt" >&2; exit 1')
    result = checkout.run("lab", "up", PATH=path)
    assert result.returncode == 7, result.stderr
    assert "Vagrant does not take build/vm/landfall.box" in result.stderr
    assert (checkout.made / "landfall.box").read_bytes() == before
    assert checkout.virsh("list", "--all", "--name").strip() == ""


def test_daemons_that_do_not_start_are_said_and_nothing_of_them_stays(checkout: Checkout) -> None:
    result = checkout.run("host", "up", PATH=give_program(checkout, "libvirtd", "exit 1"))
    assert result.returncode == 4, result.stderr
    assert "libvirt's daemons do not start; build/vm/host/up.log" in result.stderr
    assert checkout.processes() == set()


def test_no_debian_mirror_is_said_before_anything_is_built(checkout: Checkout) -> None:
    path = give_program(checkout, "df", "echo Avail; echo 100000")
    give_program(checkout, "apt-get", "exit 0")
    result = checkout.run("box", PATH=path, LANDFALL_DEBIAN_MIRROR="")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert "LANDFALL_DEBIAN_MIRROR" in result.stderr
    assert {entry.name for entry in checkout.made.iterdir()} == {"box.lock", "id_ed25519", "id_ed25519.pub"}


def test_no_space_for_the_machines_disks_is_said_before_any_is_made(checkout: Checkout) -> None:
    give_box(checkout)
    path = give_vagrant(checkout, f"touch {checkout.folder}/called")
    give_program(checkout, "df", "echo Avail; echo 5999")
    result = checkout.run("lab", "up", PATH=path)
    assert result.returncode == 6, result.stderr
    assert "take up to 6000 MiB" in result.stderr
    assert "5999 MiB free" in result.stderr
    assert checkout.virsh("list", "--all", "--name").strip() == ""
    assert "landfall" not in checkout.virsh("net-list", "--all", "--name")
    assert not (checkout.folder / "called").exists()
    assert not (checkout.made / "pool").exists()


def test_no_space_for_the_box_is_said_before_anything_is_made(checkout: Checkout) -> None:
    checkout.made.mkdir(parents=True)
    small = ["unshare", "--mount", "--propagation", "private", "bash", "-c"]
    mount = f"mount -t tmpfs -o size=64m tmpfs {checkout.made} && exec bash vagrant/box"
    result = subprocess.run([*small, mount], check=False, cwd=checkout.folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 6, result.stderr
    assert "MiB free" in result.stderr
