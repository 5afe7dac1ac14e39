"""Programs of the operating system, run with argument lists, C locale and a time limit; nothing else starts a program."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from agent.contract.errors import CommandFailed, LandfallError, ProgramMissing
from agent.system.clock import wait_until


@dataclass(frozen=True, slots=True)
class Output:
    """What a program printed."""

    argv: tuple[str, ...]
    status: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Standard output as text; bytes that are not UTF-8 survive as surrogates."""
        return self.stdout.decode("utf-8", "surrogateescape")


def run(argv: Sequence[str], *, timeout_s: float = 60.0, stdin: bytes = b"", ok: Sequence[int] = (0,)) -> Output:
    """Return the output of a finished program whose exit status is in ``ok``.

    CommandFailed carries argv, status and the last of stderr; ProgramMissing names the program. No shell, ever.
    """
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, timeout=timeout_s, env=_environment(), check=False)
    except FileNotFoundError as error:
        raise ProgramMissing(f"{argv[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(f"{argv[0]} did not finish in {timeout_s:g} s", cause=" ".join(argv)) from error
    output = Output(tuple(argv), done.returncode, done.stdout, done.stderr)
    if done.returncode not in ok:
        words = done.stderr.decode("utf-8", "replace").strip()[-2000:] or done.stdout.decode("utf-8", "replace").strip()[-500:]
        raise CommandFailed(f"{argv[0]} ended with status {done.returncode}", cause=f"{' '.join(argv)}: {words}")
    return output


def start(
    argv: Sequence[str],
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
    new_session: bool = True,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Return a running program that outlives this call; the caller waits for it or ends it."""
    try:
        return subprocess.Popen(
            argv, stdin=stdin, stdout=stdout, stderr=stderr, env=_environment(), start_new_session=new_session, pass_fds=pass_fds
        )
    except FileNotFoundError as error:
        raise ProgramMissing(f"{argv[0]} is not installed") from error


def finishes(argv: Sequence[str], limit_s: float, *, stdin: bytes = b"") -> bool:
    """Return whether a program ended with status 0 in time; its output is nobody's.

    It is not waited for any longer: what hangs in the kernel cannot be killed, and is left behind.
    """
    given = os.memfd_create("stdin")
    try:
        os.write(given, stdin)
        os.lseek(given, 0, os.SEEK_SET)
        child = start(argv, stdin=given)
    except LandfallError:
        return False
    finally:
        os.close(given)
    wait_until(lambda: child.poll() is not None, limit_s)
    if child.returncode is None:
        child.returncode = -1
    return child.returncode == 0


def _environment() -> dict[str, str]:
    """Return this process's environment with the C locale; LANDFALL_FAILPOINTS is passed on with the rest."""
    return {**os.environ, "LC_ALL": "C.UTF-8", "LANGUAGE": "C"}
