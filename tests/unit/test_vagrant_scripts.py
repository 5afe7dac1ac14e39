"""What the VM lab's scripts refuse before they touch anything: arguments, missing packages, no space, another box."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("box", "host", "kvm", "lab")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the scripts are, so that their build/vm is a folder of this test."""
    shutil.copytree(ROOT / "vagrant", tmp_path / "vagrant")
    shutil.copy(ROOT / "Vagrantfile", tmp_path)
    return tmp_path


def run(checkout: Path, script: str, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": path or os.environ["PATH"]}
    argv = ["/bin/bash", f"vagrant/{script}", *arguments]
    return subprocess.run(argv, check=False, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120)


def refused(result: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """One sentence, and the documented exit status."""
    assert result.returncode == status, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("landfall: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("script", [*SCRIPTS, "box-steps"])
def test_script_is_valid_shell(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / "vagrant" / script], check=True)


def test_vagrantfile_is_valid_ruby() -> None:
    if not shutil.which("ruby"):
        pytest.skip("ruby, which comes with vagrant, is not installed")
    subprocess.run(["ruby", "-c", ROOT / "Vagrantfile"], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("box", ["--wrong"]),
        ("kvm", ["wrong"]),
        ("host", []),
        ("host", ["wrong"]),
        ("host", ["up", "more"]),
        ("host", ["run"]),
        ("lab", []),
        ("lab", ["wrong"]),
        ("lab", ["up", "more"]),
        ("lab", ["save"]),
        ("lab", ["save", "No Name"]),
        ("lab", ["restore", "a", "b"]),
        ("lab", ["down", "--wrong"]),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(checkout: Path, script: str, arguments: list[str]) -> None:
    refused(run(checkout, script, *arguments), 2)
    assert not (checkout / "build").exists()


def test_kvm_probe_without_a_kernel_says_what_to_run(checkout: Path) -> None:
    refused(run(checkout, "kvm"), 2, "vagrant/box")


def test_missing_packages_are_named_with_the_command_that_installs_them(checkout: Path) -> None:
    programs = checkout / "programs"
    programs.mkdir()
    for name in ("bash", "cat", "cut", "dirname", "dpkg-query", "flock", "id", "mkdir", "sed", "sha256sum", "ssh-keygen", "uname"):
        (programs / name).symlink_to(shutil.which(name) or f"/usr/bin/{name}")
    refused(run(checkout, "host", "up", path=str(programs)), 2, "libvirt-daemon", "qemu-system-x86", "packaging/setup.sh --vm")
    refused(run(checkout, "lab", "up", path=str(programs)), 2, "vagrant", "packaging/setup.sh --vm")
    if os.geteuid() == 0:
        refused(run(checkout, "box", path=str(programs)), 2, "mmdebstrap", "packaging/setup.sh --vm")


def test_lab_that_is_not_up_says_so(checkout: Path) -> None:
    if Path("/run/systemd/system").is_dir():
        pytest.skip("systemd runs here, and with it perhaps a libvirtd that is not this test's")
    refused(run(checkout, "lab", "status"), 3, "vagrant/lab up")
    refused(run(checkout, "lab", "save", "fresh"), 3, "vagrant/lab up")
    refused(run(checkout, "host", "run", "true"), 3, "vagrant/host up")


def test_down_of_nothing_leaves_nothing(checkout: Path) -> None:
    if Path("/run/systemd/system").is_dir():
        pytest.skip("systemd runs here, and with it perhaps a libvirtd that is not this test's")
    assert run(checkout, "lab", "down").returncode == 0
    assert sorted(path.name for path in (checkout / "build" / "vm").iterdir()) == ["lab.lock"]


@pytest.mark.parametrize("wrong", ["not a box at all", "another provider's"])
def test_another_box_in_the_labs_place_is_refused_and_left_alone(checkout: Path, wrong: str) -> None:
    made = checkout / "build" / "vm"
    stamp = run(checkout, "box", "--stamp")
    assert stamp.returncode == 0, stamp.stderr
    (made / "box.stamp").write_text(f"trixie\n{stamp.stdout}")
    box = made / "landfall.box"
    if wrong == "not a box at all":
        box.write_text("no tar\n")
    else:
        for name, text in (("metadata.json", '{"provider": "virtualbox"}'), ("Vagrantfile", ""), ("box.img", "")):
            (checkout / name).write_text(text)
        with tarfile.open(box, "w") as archive:
            for name in ("metadata.json", "Vagrantfile", "box.img"):
                archive.add(checkout / name, name)
    before = box.read_bytes()
    refused(run(checkout, "box"), 7, "landfall.box", "vagrant/box")
    assert box.read_bytes() == before


@pytest.fixture
def drill(checkout: Path) -> Path:
    """The same with the script of `make vm-drill`, of which each step is a script that succeeds."""
    (checkout / "packaging").mkdir()
    shutil.copy(ROOT / "packaging" / "vm-drill.sh", checkout / "packaging")
    for step in ("packaging/setup.sh", "packaging/wheelhouse.sh", "vagrant/lab", "vagrant/host"):
        (checkout / step).write_text("#!/bin/bash\nexit 0\n")
        (checkout / step).chmod(0o755)
    return checkout


def hold(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = ["/bin/bash", "packaging/vm-drill.sh", *arguments]
    return subprocess.run(argv, check=False, cwd=checkout, capture_output=True, text=True, timeout=120)


WRONG = (["--wrong"], ["--at"], ["--only", "lvm-thin"], ["--only", "zfs/ext4"], ["--only", "lvm-thin/ext4/flood"], ["--scenarios"])


@pytest.mark.parametrize("arguments", WRONG)
def test_a_drill_that_cannot_be_is_refused_before_anything_is_installed(drill: Path, arguments: list[str]) -> None:
    refused(hold(drill, *arguments), 2)
    assert not (drill / "build").exists()


@pytest.mark.parametrize(("step", "status"), [("packaging/setup.sh", 2), ("vagrant/lab", 6), ("vagrant/lab", 7), ("vagrant/lab", 8)])
def test_a_drill_ends_with_the_status_of_the_step_that_failed(drill: Path, step: str, status: int) -> None:
    """No space, the wrong box, a machine that does not come up: the one sentence is the step's own."""
    (drill / step).write_text(f"#!/bin/bash\necho 'landfall: what is wrong' >&2; exit {status}\n")
    result = hold(drill)
    assert result.returncode == status, result.stderr
    assert result.stderr.count("landfall: what is wrong") == 1
    assert f"NOT clean (status {status})" in result.stderr.splitlines()[-1]
