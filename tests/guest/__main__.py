"""Runs a command in a guest whose kernel has device-mapper and an NFS server, for machines whose own kernel has not.

    python -m tests.guest run [--limit-s N] -- COMMAND ...
    python -m tests.guest test [-- ARGUMENTS OF PYTEST]     every test that needs that kernel, in guests side by side

The guest is user-mode Linux, from Debian's package: a process of this machine, seconds to boot, its root filesystem this machine's
own, mounted read-only. So the guest has the same programs, the same Python and the same repository, and nothing is built for it. It
can write only to memory, to a blank disk that goes with it, and to a folder of its own under build/guest. The exit
status is the command's; 125 if the guest did not give one, 126 if no guest can be started.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
KERNEL = "linux.uml"
PACKAGES = {
    KERNEL: "user-mode-linux",
    "lvm": "lvm2",
    "thin_delta": "thin-provisioning-tools",
    "modprobe": "kmod",
    "exportfs": "nfs-kernel-server",
    "mount.nfs": "nfs-common",
}
NO_STATUS = 125
CANNOT = 126
DISK_BYTES = 12 << 30
GROUPS = {"storage": ("tests/storage",), "lab": ("tests/lab", "tests/faults")}
"""What is tested side by side, each in a guest of its own."""
MARKERS = ("device_mapper", "nfs_server", "netem")
TEST_LIMIT_S = 5400.0
NOTHING_SELECTED = 5  # pytest's status for it
_SHARED_MEMORY = Path("/dev/shm")


def why_not() -> str:
    """Returns why no guest can be started here, one sentence; empty if one can."""
    if os.geteuid() != 0:
        return "a guest sees this machine's files as the user who starts it, so it needs root."
    missing = sorted({package for program, package in PACKAGES.items() if not shutil.which(program)})
    return f"no guest can be started: install {' '.join(missing)}." if missing else ""


def test(arguments: list[str], memory_mib: int) -> int:
    """Runs the tests that need the guest's kernel; returns pytest's status, the worst of all guests'."""
    python = str(ROOT / "build" / "venv" / "bin" / "python")
    # The guest can keep nothing that it compiles.
    subprocess.run([python, "-m", "compileall", "-q", "agent", "mgmt", "tests"], cwd=ROOT, check=True)
    statuses: dict[str, int] = {}

    def one(name: str) -> None:
        words = ["-m", "pytest", "-m", " or ".join(MARKERS), "-o", "cache_dir=/run/pytest", "-v", "--color=no", "--durations=12"]
        statuses[name] = run([python, *words, *_marked(GROUPS[name]), *arguments], TEST_LIMIT_S, memory_mib, f"{name:8}| ".encode())

    guests = [threading.Thread(target=one, args=(name,)) for name in GROUPS]
    for guest in guests:
        guest.start()
    for guest in guests:
        guest.join()
    selected = [statuses.get(name, NO_STATUS) for name in GROUPS if statuses.get(name) != NOTHING_SELECTED]
    return max(selected, default=NOTHING_SELECTED)


def _marked(folders: tuple[str, ...]) -> list[str]:
    """Returns the files with tests for the guest: to collect the others takes a guest half a minute."""
    files = (file for folder in folders for file in sorted((ROOT / folder).glob("test_*.py")))
    return [str(file) for file in files if any(f"pytest.mark.{marker}" in file.read_text() for marker in MARKERS)]


def run(command: list[str], limit_s: float, memory_mib: int, prefix: bytes = b"") -> int:
    """Boots a guest, runs the command with its output on ours, each line behind the prefix, and ends the guest whatever happens."""
    folder = ROOT / "build" / "guest" / secrets.token_hex(6)
    folder.mkdir(parents=True)
    try:
        (folder / "command").write_text(f"cd {shlex.quote(str(ROOT))} && exec {shlex.join(command)}\n")
        status = _boot(folder, limit_s, memory_mib, prefix)
        if status == NO_STATUS:
            kernel = (folder / "kernel.log").read_bytes().decode("utf-8", "replace")
            sys.stderr.write(
                f"landfall guest: it ended without a status, or did not end in {limit_s:g} s. Its last words:\n{kernel[-3000:]}\n"
            )
        return status
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _boot(folder: Path, limit_s: float, memory_mib: int, prefix: bytes) -> int:
    fast = _SHARED_MEMORY.is_dir() and os.statvfs(_SHARED_MEMORY).f_bavail * os.statvfs(_SHARED_MEMORY).f_frsize > 2 * memory_mib << 20
    room = _SHARED_MEMORY if fast else folder
    # Without a name, so that it goes with its last user, however that ends.
    with tempfile.TemporaryFile(dir=room) as disk:
        disk.truncate(DISK_BYTES)
        return _boot_with(folder, room, disk.fileno(), limit_s, memory_mib, prefix)


def _boot_with(folder: Path, room: Path, disk_fd: int, limit_s: float, memory_mib: int, prefix: bytes) -> int:
    init = Path(__file__).with_name("init")
    argv = [
        *(KERNEL, f"mem={memory_mib}M", "panic=1", f"uml_dir={folder}/", "umid=guest"),
        *("root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", f"init={init}", f"LANDFALL_GUEST={folder}"),
        f"ubda=/proc/self/fd/{disk_fd}",
        *("con=null", "con0=null,fd:2", "con1=null,fd:1"),
    ]
    environment = {**os.environ, "TMPDIR": str(room)}
    with open(folder / "kernel.log", "wb") as log:
        guest = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
            cwd=folder,
            pass_fds=(disk_fd,),
        )
        timer = threading.Timer(limit_s, _end, [guest])
        timer.start()
        try:
            assert guest.stdout is not None
            output_fd = guest.stdout.fileno()
            for part in guest.stdout if prefix else iter(lambda: os.read(output_fd, 1 << 16), b""):
                sys.stdout.buffer.write(prefix + part)
                sys.stdout.buffer.flush()
        finally:
            timer.cancel()
            _end(guest)
            guest.wait()
    try:
        return int((folder / "status").read_text())
    except (OSError, ValueError):
        return NO_STATUS


def _end(guest: subprocess.Popen[bytes]) -> None:
    """Kills the guest with all its processes; they are a group of their own."""
    try:
        os.killpg(guest.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _stop(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="guest", description="Runs a command in a guest with device-mapper.")
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("run")
    verb.add_argument("--limit-s", type=float, default=1800.0)
    verb.add_argument("--memory-mib", type=int, default=2560)
    verb.add_argument("command", nargs="+")
    verb = verbs.add_parser("test")
    verb.add_argument("--memory-mib", type=int, default=2560)
    verb.add_argument("arguments", nargs="*")
    asked = parser.parse_args()
    reason = why_not()
    if reason:
        sys.stderr.write(f"landfall guest: {reason}\n")
        return CANNOT
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _stop)
    if "arguments" in asked:
        return test(asked.arguments, asked.memory_mib)
    return run(asked.command, asked.limit_s, asked.memory_mib)


if __name__ == "__main__":
    sys.exit(main())
