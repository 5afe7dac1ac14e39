"""Skins on a loss statement: a table for a terminal, lines for a pipe, JSON, one HTML page that needs nothing else.

Names come from a volume whose users may be hostile: nothing that a terminal, a log or a browser would act on leaves this module
as it came (G17).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict

import jinja2
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from agent.contract.messages import Outcome, from_document, to_document
from mgmt.losses import rpo_of
from mgmt.report import NOTHING_THERE, FileAccount, LossStatement

STYLES = {
    Outcome.RECOVERED: "green",
    Outcome.KEPT: "yellow",
    Outcome.ABSENT: "red",
    Outcome.DAMAGED: "bold red",
    Outcome.DELETED: "dim",
    Outcome.HELD: "cyan",
}
WORDS = {
    Outcome.RECOVERED: "recovered",
    Outcome.KEPT: "kept at base",
    Outcome.ABSENT: "absent",
    Outcome.DAMAGED: "damaged",
    Outcome.DELETED: "deleted",
    Outcome.HELD: "held",
}
WORST_FIRST = (Outcome.DAMAGED, Outcome.ABSENT, Outcome.KEPT, Outcome.HELD, Outcome.DELETED, Outcome.RECOVERED)
_NAMED_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}


def visible(text: str) -> str:
    r"""Return ``text`` with everything escaped that is not a plain printable character: ``\xNN`` for a byte that is not UTF-8.

    Controls, format characters (such as those that turn the direction of writing), separators other than the space, and the
    backslash itself; so two different names never look the same for the escaping's sake.
    """
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character in _NAMED_ESCAPES:
        return _NAMED_ESCAPES[character]
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def bytes_words(count: int) -> str:
    """Return a number of bytes as people read it: ``3.4 MiB``."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def moment(at_ns: int) -> str:
    """Return a point in time as people read it, in UTC; nothing for none."""
    if not at_ns:
        return "-"
    try:
        return datetime.datetime.fromtimestamp(at_ns / 1e9, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"{at_ns} ns"


def summary(statement: LossStatement) -> str:
    """Return the statement in one sentence."""
    files, done = statement.files, "were" if statement.generation else "would be"
    return (
        f"{files.recovered:,} of {files.changed:,} changed files {done} recovered; {files.kept_at_base:,} keep the base's content, "
        f"{files.absent:,} are absent, {files.damaged:,} damaged, {files.deleted:,} deleted, {files.held:,} held."
    )


def to_json(statement: LossStatement) -> str:
    """Return the statement as JSON: ASCII, names with bytes that are not UTF-8 as lone surrogates."""
    return json.dumps(to_document(statement), indent=1, ensure_ascii=True)


def from_json(text: str) -> LossStatement:
    """Return the statement that ``to_json`` wrote; RequestRefused if it is none."""
    return from_document(json.loads(text), LossStatement)


def plain_lines(statement: LossStatement) -> Iterator[str]:
    """Yield the statement for a pipe: a head of comments, then a line per file, four fields parted by tabs."""
    for name, value in _facts(statement):
        yield f"# {name}: {value}"
    yield f"# {summary(statement)}"
    for account in statement.accounts:
        yield "\t".join((account.outcome, str(account.size_bytes), path_of(account), visible(account.reason)))


def table(statement: LossStatement, *, rows: int = 40) -> RenderableType:
    """Return what a terminal shows: the facts, a bar of what arrived, the totals, and the first ``rows`` files that are not recovered."""
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(statement):
        facts.add_row(Text(name, style="dim"), Text(value))
    totals = Table(title=None, box=None, header_style="dim", padding=(0, 2))
    counts = asdict(statement.files)
    for outcome in Outcome:
        totals.add_column(WORDS[outcome], justify="right")
    totals.add_row(*(Text(f"{counts[outcome.value]:,}", style=STYLES[outcome]) for outcome in Outcome))
    parts: list[RenderableType] = [
        facts,
        _bar("by address", statement.picture.by_address),
        _bar("as sent", statement.picture.by_send_order),
    ]
    parts += [Text(), totals, Text(), _lost_table(statement, rows), Text(summary(statement), style="bold")]
    return Group(*parts)


def print_table(statement: LossStatement, console: Console, *, rows: int = 40) -> None:
    """Print the table on a terminal, lines into a pipe."""
    if console.is_terminal:
        console.print(table(statement, rows=rows))
    else:
        for line in plain_lines(statement):
            console.file.write(line + "\n")


def to_html(statement: LossStatement) -> str:
    """Return one page that needs no network, fit to be attached to a ticket; everything from the volume is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mgmt", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    counts = asdict(statement.files)
    return environment.get_template("loss_statement.html.j2").render(
        title=f"Loss statement of {visible(statement.volume_name)}",
        summary=summary(statement),
        facts=list(_facts(statement)),
        tiles=[(outcome.value, WORDS[outcome], counts[outcome.value]) for outcome in Outcome],
        strips=[
            ("Along the volume, by address", statement.picture.by_address),
            ("Along the files, in the order in which they are sent", statement.picture.by_send_order),
        ],
        broken_sets=[(visible(broken.name), broken.members, broken.not_whole) for broken in statement.broken_sets],
        words={outcome.value: WORDS[outcome] for outcome in Outcome},
        rows=[
            (account.outcome.value, path_of(account), account.size_bytes, account.kind, visible(account.reason), account.digest)
            for account in _worst_first(statement.accounts)
        ],
    )


def _facts(statement: LossStatement) -> Iterator[tuple[str, str]]:
    around, seconds = statement.circumstances, statement.seconds
    yield "volume", f"{visible(statement.volume_name)} ({statement.volume})"
    yield "transfer", f"{statement.transfer}, {around.primary} to {around.secondary}"
    yield "point in time of the base", f"{statement.base.name}, {moment(statement.base_taken_ns)}"
    yield "point in time of the target", f"{statement.target.name}, {moment(statement.target_taken_ns)}"
    if statement.generation:
        yield (
            "stored as",
            f"{statement.generation.name}, {statement.verified_files:,} files read back ({bytes_words(statement.verified_bytes)})",
        )
    else:
        yield "stored as", "nothing was stored: these are the verdicts only"
    share = 100 * statement.bytes.arrived // statement.bytes.changed if statement.bytes.changed else 100
    yield "arrived", f"{bytes_words(statement.bytes.arrived)} of {bytes_words(statement.bytes.changed)} changed ({share} %)"
    yield "deletions", "all applied, everything arrived" if statement.complete else statement.deletions.value
    for broken in statement.broken_sets:
        yield (
            "atomic set not recovered",
            f"{visible(broken.name)}: {broken.not_whole} of {broken.members} changed files did not arrive whole",
        )
    yield "RPO", _rpo_words(statement)
    yield "seconds", f"{seconds.detect:.1f} to detect, {seconds.determine:.1f} to determine, {seconds.recover:.1f} to recover"
    yield "by", f"{visible(around.operator)}, {moment(around.at_ns)}, Landfall {around.release}"


def _rpo_words(statement: LossStatement) -> str:
    rpo = rpo_of(statement)
    others = "everything" if rpo.others_s is None else span(rpo.others_s)
    return f"{span(rpo.recovered_s)} for recovered files, {others} for the others"


def span(seconds: float) -> str:
    """Return a length of time as people read it: ``12 s``, ``3.4 min``, ``5.6 h``, ``7.8 days``."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def path_of(account: FileAccount) -> str:
    """Return every name of a file, made visible, with what it was called and where it is now if that is elsewhere."""
    shown = " = ".join(visible(path) or "/" for path in account.paths)
    if account.base_paths:
        shown += f" (was {' = '.join(visible(path) for path in account.base_paths)})"
    return shown + (f" (now {visible(account.found_at)})" if account.found_at else "")


def _worst_first(accounts: Iterable[FileAccount]) -> list[FileAccount]:
    return sorted(accounts, key=lambda account: WORST_FIRST.index(account.outcome))


def _lost_table(statement: LossStatement, rows: int) -> RenderableType:
    lost = _worst_first(statement.lost)
    if not lost:
        return Text("Every changed file is as the primary had it.", style="green")
    shown = Table(box=None, header_style="dim", padding=(0, 1), expand=True)
    shown.add_column("verdict", no_wrap=True)
    shown.add_column("size", justify="right", no_wrap=True)
    shown.add_column("file", no_wrap=True, overflow="ellipsis", ratio=3)
    shown.add_column("why", no_wrap=True, overflow="ellipsis", ratio=4)
    for account in lost[:rows]:
        word = Text(WORDS[account.outcome], style=STYLES[account.outcome])
        shown.add_row(word, bytes_words(account.size_bytes), Text(path_of(account)), Text(visible(account.reason), style="dim"))
    if len(lost) > rows:
        shown.add_row("...", "", Text(f"and {len(lost) - rows:,} more; --json and --html name every one"), "")
    return shown


def _bar(name: str, cells: tuple[int, ...], width: int = 64) -> Text:
    """Return a line of blocks, darker where more arrived."""
    bar = Text()
    bar.append(f"{name:>12} ", style="dim")
    step = -(-len(cells) // width)
    for at in range(0, len(cells), step):
        known = [cell for cell in cells[at : at + step] if cell != NOTHING_THERE]
        share = sum(known) / len(known) if known else -1.0
        glyph, style = ("·", "dim") if share < 0 else ("█", "green") if share >= 999 else ("▒", "yellow") if share > 0 else ("░", "red")
        bar.append(glyph, style=style)
    return bar
