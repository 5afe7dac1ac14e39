"""The messages as lines of JSON: strict both ways. Unknown or missing keys and values of another type are refused."""

from __future__ import annotations

import json
from enum import Enum
from typing import Any, Final, TypeVar
from uuid import UUID

import cattrs
from cattrs.preconf.json import make_converter

from agent.contract.errors import RequestRefused

PROTOCOL: Final = 1
MAX_LINE_BYTES: Final = 32 << 20
"""An update instruction names its files by number: a million of them take 8 MB."""

T = TypeVar("T")


def to_document(value: Any) -> Any:
    """Return ``value`` (a dataclass of this module) as plain JSON values."""
    return _converter().unstructure(value)


def from_document(document: Any, kind: type[T]) -> T:
    """Return the ``kind`` that ``document`` says; RequestRefused for unknown or missing keys and wrong types."""
    try:
        return _converter().structure(document, kind)
    except (cattrs.BaseValidationError, cattrs.StructureHandlerNotFoundError, ValueError, TypeError, KeyError, AttributeError) as error:
        detail = "; ".join(cattrs.transform_error(error)) if isinstance(error, cattrs.BaseValidationError) else str(error)
        raise RequestRefused(f"not a well-formed {kind.__name__}", cause=detail) from error


def encode_line(document: Any) -> bytes:
    """Return ``document`` as one line."""
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def decode_line(line: bytes) -> dict[str, Any]:
    """Return the object on a line; RequestRefused if it is none."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestRefused("a line is not JSON", cause=str(error)) from error
    if not isinstance(document, dict):
        raise RequestRefused("a line is not a JSON object")
    return document


def _converter() -> cattrs.Converter:
    return _CONVERTER


def _make_converter() -> cattrs.Converter:
    converter = make_converter(forbid_extra_keys=True, detailed_validation=True)

    def strict(kind: type[Any]) -> Any:
        allowed = (int, float) if kind is float else (kind,)

        def check(value: Any, asked: type[Any]) -> Any:
            if issubclass(asked, Enum):  # its values are strings, so cattrs takes it for a kind of str
                return asked(value)
            if type(value) not in allowed:
                raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
            return value

        return check

    for kind in (int, str, bool, float):
        converter.register_structure_hook(kind, strict(kind))
    converter.register_structure_hook(UUID, lambda value, _: UUID(value))
    converter.register_unstructure_hook(UUID, str)
    return converter


_CONVERTER: Final = _make_converter()
