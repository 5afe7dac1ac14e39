"""A peer of the cycle: two devices made equal by comparing digests of all of both, over a pipe such as SSH.

``python -m tests.bench.whole_device near SOURCE -- PROGRAM ...`` runs PROGRAM ..., which is to run ``... far TARGET`` on the other side.
Both read everything at the same time; the far side says a digest for every chunk of 64 KiB, the near side answers with the chunks that
differ. It is our own because PyPI's blocksync comes as source only (no wheel to pin) and does the same; the digest is xxh3-128, the
fastest there is here, so the device's speed and not the digest's is what counts.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from typing import IO, Final

import xxhash

CHUNK: Final = 64 * 1024
READ: Final = 64 * CHUNK
_HEAD: Final = struct.Struct("<QI")


def near(source: str, argv: list[str]) -> int:
    """Send the chunks of ``source`` that differ and return how many bytes these were."""
    sent = 0
    with open(source, "rb", buffering=0) as device, subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        at = 0
        while data := device.read(READ):
            chunks = range(0, len(data), CHUNK)
            theirs = _exactly(program.stdout, 16 * len(chunks))
            for number, begin in enumerate(chunks):
                chunk = data[begin : begin + CHUNK]
                if xxhash.xxh3_128_digest(chunk) != theirs[16 * number : 16 * number + 16]:
                    program.stdin.write(_HEAD.pack(at + begin, len(chunk)) + chunk)
                    sent += len(chunk)
            at += len(data)
        program.stdin.write(_HEAD.pack(0, 0))
        program.stdin.flush()
        if program.wait():
            raise RuntimeError("the other side failed")
    return sent


def far(target: str) -> None:
    """Say the digests of ``target`` and write what comes; return when it is durable."""
    reader = os.fork()
    if reader == 0:  # digests go out while differences come in, so that neither side waits for the other
        with open(target, "rb", buffering=0) as device, open(1, "wb") as out:
            while data := device.read(READ):
                out.write(b"".join(xxhash.xxh3_128_digest(data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)))
        os._exit(0)
    device_fd = os.open(target, os.O_WRONLY)
    with open(0, "rb") as incoming:
        while True:
            offset, length = _HEAD.unpack(_exactly(incoming, _HEAD.size))
            if not length:
                break
            os.pwrite(device_fd, _exactly(incoming, length), offset)
    os.fdatasync(device_fd)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]))


def _exactly(stream: IO[bytes], length: int) -> bytes:
    data = stream.read(length)
    if len(data) != length:
        raise EOFError("the other side closed")
    return bytes(data)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["near", source, "--", *argv]:
            sys.stdout.write(f"{near(source, argv)}\n")
        case ["far", target]:
            far(target)
        case _:
            sys.exit(__doc__)
