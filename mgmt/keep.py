"""Which generations a volume keeps: so many of the newest, and the newest of so many hours, days, weeks and months. Pure.

The rule is the one that restic's and borg's users know: each named span keeps the newest generation in it, counted back from the
newest generation that there is; an empty span uses up nothing. Spans are of UTC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Final, Self

from agent.contract.errors import ConfigInvalid
from agent.contract.identity import GenerationId

MOST: Final = 9_999

_SPAN_OF: Final[dict[str, Callable[[datetime], str]]] = {
    "hourly": lambda moment: moment.strftime("%Y-%m-%d %H"),
    "daily": lambda moment: moment.strftime("%Y-%m-%d"),
    "weekly": lambda moment: moment.strftime("%G-%V"),
    "monthly": lambda moment: moment.strftime("%Y-%m"),
}


@dataclass(frozen=True, slots=True)
class Keep:
    """How many generations are kept; all 0 stands for the configuration's keep_generations."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0

    def __str__(self) -> str:
        return ",".join(f"{name}={number}" for name, number in asdict(self).items() if number)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what ``last=16,hourly=24,daily=7`` says; ConfigInvalid names the word that says nothing."""
        numbers: dict[str, int] = {}
        for word in filter(None, text.split(",")):
            name, _, digits = word.partition("=")
            known = name in cls.__dataclass_fields__ and name not in numbers
            if not known or not digits.isascii() or not digits.isdigit() or not 0 < int(digits) <= MOST:
                raise ConfigInvalid(
                    f"{word!r} does not say what to keep", fix="Write it like last=16,hourly=24,daily=7,weekly=4,monthly=12."
                )
            numbers[name] = int(digits)
        return cls(**numbers)


def let_go(held: Iterable[tuple[GenerationId, int]], keep: Keep, least: int) -> list[GenerationId]:
    """Return the generations that nothing keeps, oldest first; ``held`` are generations with the time they were taken in ns.

    The newest ``least`` are kept whatever ``keep`` says: a base and a target, without which the next differential would be of everything.
    """
    newest_first = sorted(held, key=lambda found: (found[0].epoch, found[0].counter), reverse=True)
    kept = {generation for generation, _ in newest_first[: max(keep.last, least)]}
    for name, span_of in _SPAN_OF.items():
        spans: set[str] = set()
        for generation, taken_ns in newest_first:
            span = span_of(datetime.fromtimestamp(taken_ns / 1e9, UTC))
            if span not in spans and len(spans) < getattr(keep, name):
                spans.add(span)
                kept.add(generation)
    return [generation for generation, _ in reversed(newest_first) if generation not in kept]
