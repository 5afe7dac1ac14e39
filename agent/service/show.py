"""A DMI in words, for people and as JSON. Names are shown with control characters escaped, so that a name cannot write to a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from agent.contract.dmi import Change, Dmi, FileKind, Owner, Side
from agent.contract.identity import BLOCK_BYTES


def text_lines(dmi: Dmi) -> Iterator[str]:
    """Yield a summary, then a line for each changed file."""
    head = dmi.head
    size = f"{head.volume_bytes} bytes, sectors of {head.sector_bytes}"
    yield f"volume       {head.volume_name} ({head.base.volume}), {head.filesystem}, {size}"
    yield f"transfer     {head.transfer}: {head.base.name} -> {head.target.name}"
    yield f"differential {head.differential_volume}"
    blocks = dmi.block_count.astype(np.uint64)
    for owner in Owner:
        mine = dmi.owner == owner
        yield f"pieces       {owner.name.lower():9} {int(mine.sum()):9} {int(blocks[mine].sum()) * BLOCK_BYTES:15} bytes"
    yield f"files        {dmi.file_total}"
    for file in range(dmi.file_total):
        document = _file(dmi, file)
        names = " = ".join(document["paths"] or document["base_paths"] or ["(no name)"])
        what = f"{document['kind']:9} {'+'.join(document['change']):24}"
        yield f"{document['inode']:>12} {what} {document['size']:>14} {document['pieces']:>6} pieces  {names}"


def json_lines(dmi: Dmi) -> Iterator[dict[str, Any]]:
    """Yield the head, then one object for each changed file."""
    head = dmi.head
    yield {
        "transfer": str(head.transfer),
        "volume": str(head.base.volume),
        "volume_name": head.volume_name,
        "volume_bytes": head.volume_bytes,
        "filesystem": str(head.filesystem),
        "base": head.base.name,
        "target": head.target.name,
        "differential_volume": head.differential_volume,
        "pieces": dmi.piece_total,
        "changed_bytes": int(dmi.block_count.sum(dtype=np.uint64)) * BLOCK_BYTES,
        "files": dmi.file_total,
    }
    for file in range(dmi.file_total):
        yield _file(dmi, file)


def _file(dmi: Dmi, file: int) -> dict[str, Any]:
    return {
        "row": file,
        "inode": int(dmi.inode[file]),
        "kind": FileKind(int(dmi.kind[file])).name.lower(),
        "change": [flag.name.lower() for flag in Change if flag.name and int(dmi.change[file]) & flag],
        "mode": f"{int(dmi.mode[file]):04o}",
        "uid": int(dmi.uid[file]),
        "gid": int(dmi.gid[file]),
        "size": int(dmi.size[file]),
        "mtime": f"{int(dmi.mtime_s[file])}.{int(dmi.mtime_ns[file]):09d}",
        "pieces": len(dmi.needs(file)),
        "extents": len(dmi.extents(file)),
        "xattrs": [_shown(name) for name, _ in dmi.xattrs(file)],
        "digest": dmi.file_digest[file].tobytes().hex(),
        "paths": [_shown(path) for _, path in dmi.names(file, Side.TARGET)],
        "base_paths": [_shown(path) for _, path in dmi.names(file, Side.BASE)],
    }


def _shown(name: bytes) -> str:
    text = name.decode("utf-8", "backslashreplace") or "/"
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
