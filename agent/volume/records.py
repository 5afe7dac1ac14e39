"""The small files beside the images: what a volume is, what a generation is. Written durably, read strictly."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final, TypeVar

from agent.contract.errors import NotOurs, RequestRefused, VersionUnknown
from agent.contract.messages import GenerationFacts, from_document, to_document
from agent.system.files import write_durably
from agent.volume.substrate import VolumeRecord

FORMAT: Final = 1
_MAX_BYTES: Final = 1 << 20

T = TypeVar("T", VolumeRecord, GenerationFacts)


def write_record(path: Path, record: VolumeRecord | GenerationFacts) -> None:
    """Replace the record at ``path`` in one durable step."""
    document = {"format": FORMAT, **to_document(record)}
    write_durably(path, json.dumps(document, indent=2, sort_keys=True).encode() + b"\n")


def read_record(path: Path, kind: type[T]) -> T:
    """Return the record at ``path``; NotOurs if it does not read as one, VersionUnknown if a newer release wrote it."""
    record_fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(record_fd, "rb") as file:
        content = file.read(_MAX_BYTES)
    try:
        document = json.loads(content)
        if not isinstance(document, dict):
            raise RequestRefused("not an object")
        version = document.pop("format", None)
    except (ValueError, RecursionError, RequestRefused) as error:
        raise NotOurs(f"{path} is no record of Landfall", cause=str(error)) from error
    if version != FORMAT:
        raise VersionUnknown(f"{path} has format {version!r}, this release knows {FORMAT}")
    try:
        return from_document(document, kind)
    except RequestRefused as error:
        raise NotOurs(f"{path} is no record of Landfall", cause=error.cause) from error
