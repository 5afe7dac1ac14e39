"""The small files beside the images: what a volume is, what a generation is. Written durably, read strictly."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final, TypeVar

from agent.contract.errors import NotOurs, RequestRefused, VersionUnknown
from agent.contract.messages import GenerationFacts, from_document, to_document
from agent.system.files import write_durably
from agent.volume.substrate import VolumeRecord

FORMAT: Final = 1
_MAX_BYTES: Final = 1 << 20
_IMAGE_MTIME_NS: Final = "image_mtime_ns"

T = TypeVar("T", VolumeRecord, GenerationFacts)


def write_record(path: Path, record: VolumeRecord | GenerationFacts, *, image_mtime_ns: int | None = None) -> None:
    """Replace the record at ``path`` in one durable step; ``image_mtime_ns``: when its image was written to for the last time."""
    document = {"format": FORMAT, **to_document(record)}
    if image_mtime_ns is not None:
        document[_IMAGE_MTIME_NS] = image_mtime_ns
    write_durably(path, json.dumps(document, indent=2, sort_keys=True).encode() + b"\n")


def read_record(path: Path, kind: type[T]) -> T:
    """Return the record at ``path``; NotOurs if it does not read as one, VersionUnknown if a newer release wrote it."""
    document = _document(path)
    if kind is GenerationFacts:
        document.pop(_IMAGE_MTIME_NS, None)
    try:
        return from_document(document, kind)
    except RequestRefused as error:
        raise NotOurs(f"{path} is no record of Landfall", cause=error.cause) from error


def image_mtime_ns(path: Path) -> int | None:
    """Return when the image was written to for the last time before the record was made; None if the record does not say."""
    found = _document(path).get(_IMAGE_MTIME_NS)
    return found if isinstance(found, int) else None


def _document(path: Path) -> dict[str, Any]:
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
    return document
