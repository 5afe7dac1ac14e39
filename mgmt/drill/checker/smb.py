"""Read files back as a client does, by smbclient, and hold them against what they must be."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mgmt.drill.checker.trees import Tree, file_digest

# What needs no quoting on an SMB client's command line and no mapping on the way.
_PLAIN = re.compile(rb"[A-Za-z0-9_+=,@][A-Za-z0-9_+=,@./ -]*")
_AT_ONCE = 25


def choose(target: Tree, identities: Sequence[bytes], count: int) -> list[bytes]:
    """Return up to ``count`` paths of regular files, spread over ``identities``, that an SMB client can name."""
    paths = sorted(
        path
        for identity in identities
        for path in target.by_identity[identity][:1]
        if target.nodes[path].kind == stat.S_IFREG and _PLAIN.fullmatch(path) and target.nodes[path].size < 64 << 20
    )
    step = max(1, len(paths) // count) if count else 1
    return paths[::step][:count]


def read_back(share: str, client: Sequence[str], expected: Tree, paths: Sequence[bytes]) -> list[tuple[bytes, str]]:
    """Return (path, what is wrong) of the files whose bytes, read through SMB, are not those of ``expected``."""
    wrong: list[tuple[bytes, str]] = []
    with tempfile.TemporaryDirectory(prefix="landfall-check-") as directory:
        for start in range(0, len(paths), _AT_ONCE):
            batch = list(enumerate(paths[start : start + _AT_ONCE], start))
            words = "; ".join(f'get "{os.fsdecode(path)}" {directory}/{row}' for row, path in batch)
            done = subprocess.run([*client, share, "-c", words], capture_output=True, check=False, timeout=300)
            for row, path in batch:
                copy = Path(directory) / str(row)
                if not copy.exists():
                    wrong.append((path, "not readable over SMB: " + (done.stdout + done.stderr).decode(errors="replace").strip()[-200:]))
                    continue
                with copy.open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    if size != expected.nodes[path].size or file_digest(file.fileno(), size) != expected.nodes[path].content:
                        wrong.append((path, "differs when read over SMB"))
                copy.unlink()
    return wrong
