"""A number of bytes as people write it on a command line."""

from __future__ import annotations

from typing import Final

import click

LARGEST: Final = (1 << 63) - 1
"""What the kernel and the catalog count to."""


class Size(click.ParamType[int]):
    """A number of bytes, with K, M, G or T for powers of 1024."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes, or refuse."""
        if isinstance(value, int):
            return value
        text = str(value).upper().removesuffix("IB").removesuffix("B")
        exponent = "KMGT".find(text[-1:]) + 1 if text else 0
        digits = text[:-1] if exponent else text
        if not digits.isascii() or not digits.isdigit():
            self.fail(f"{value!r} is not a size such as 512M or 12G", param, ctx)
        size = int(digits.lstrip("0")[:20] or 0) << (10 * exponent)
        if size > LARGEST:
            self.fail(f"{value!r} is more than any filesystem holds", param, ctx)
        return size
