"""A volume group of the test's own, on a loop device over a file, gone when the test ends."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

SIZE_BYTES = 1 << 30


@contextmanager
def volume_group(folder: Path, *, tag: str | None = "landfall-lab", size_bytes: int = SIZE_BYTES) -> Iterator[str]:
    """Gives the name of a fresh volume group."""
    name, image = f"landfall-test-{secrets.token_hex(4)}", folder / "disk"
    with open(image, "wb") as file:
        file.truncate(size_bytes)
    with ExitStack() as after:
        after.callback(image.unlink)
        device = command("losetup", "--find", "--show", str(image)).strip()
        after.callback(command, "losetup", "--detach", device)
        command("vgcreate", *(["--addtag", tag] if tag else []), name, device)
        after.callback(command, "vgremove", "-ff", "-y", name)
        yield name


def command(*argv: str) -> str:
    """Run a program; its own words are the failure's message."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout
