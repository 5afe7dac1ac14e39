"""The results of the benchmarks as one HTML page that needs nothing else: build/bench/index.html from build/bench/*.json.

Every figure stands with its goal and by how much it is missed; below, what was measured, drawn as SVG. ``python -m tests.bench page``.
"""

from __future__ import annotations

import datetime
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, Final

from tests.bench import plots
from tests.bench.harness import parsed, parser

_ORDER: Final = ("cycle", "owners", "freeze", "recovery", "scattered", "copy", "order", "transfer", "foreground", "determination")

_STYLE: Final = """
:root { color-scheme: light dark; --bg: #fbfaf8; --fg: #1d2226; --dim: #68717a; --line: #dcd9d3; --card: #fff;
  --good: #1f8a4c; --bad: #c4371f; --s0: #1d7a99; --s1: #c4371f; --s2: #b07a00; --s3: #7a4fa3;
  --s4: #1f8a4c; --s5: #68717a; --s6: #8e1230; --s7: #3c5a14; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #14171a; --fg: #e6e4df; --dim: #98a1a9; --line: #2c3238; --card: #1b2024;
  --good: #4cc581; --bad: #f07a63; --s0: #5cbfe0; --s1: #f07a63; --s2: #e0b04a; --s3: #b893e0;
  --s4: #4cc581; --s5: #98a1a9; --s6: #f0708c; --s7: #a6c96a; } }
body { margin: 0 auto; max-width: 1100px; padding: 2rem 1.25rem 4rem; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { margin: 2.5rem 0 .3rem; font-size: 1.2rem; }
p, figcaption { color: var(--dim); max-width: 80ch; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; margin: .6rem 0; }
th { color: var(--dim); font-weight: 500; text-align: left; } th, td { padding: .25rem .5rem; border-bottom: 1px solid var(--line); }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
figure { margin: 1rem 0; }
svg { display: block; width: 100%; background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
svg text { fill: var(--fg); font: 12px system-ui, sans-serif; } svg .axis { stroke: var(--line); }
"""


def main(arguments: Sequence[str] = ()) -> int:
    """Write the page and return the exit status."""
    asked = parsed(parser(__doc__), arguments)
    documents = [json.loads(path.read_text()) for path in sorted(asked.folder.glob("*.json"))]
    path = asked.folder / "index.html"
    path.write_text(page([document for document in documents if "bench" in document]))
    sys.stdout.write(f"page: {path}\n")
    return 0


def page(documents: list[dict[str, Any]]) -> str:
    """Return the page of the results that there are."""
    places = {name: place for place, name in enumerate(_ORDER)}
    documents = sorted(documents, key=lambda document: (places.get(document["bench"].split("-")[0], len(places)), document["bench"]))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Landfall: benchmarks</title>'
        f"<style>{_STYLE}</style></head><body><h1>Landfall: benchmarks</h1>"
        "<p>Figures are medians; peers ran in the same run, taking turns. Ratios say more than absolute figures. "
        "A figure in the short form has no goal, since goals are those of the full size.</p>"
        f"{_goals(documents)}{''.join(map(_section, documents))}</body></html>\n"
    )


def _goals(documents: list[dict[str, Any]]) -> str:
    """Return the table of all figures that have a goal."""
    rows = [_row(document["bench"], figure) for document in documents for figure in document["figures"] if figure["goal"] is not None]
    return f"<h2>Goals</h2>{_table(rows)}" if rows else ""


def _table(rows: list[str]) -> str:
    return f"<table><tr><th>bench</th><th>figure</th><th>measured</th><th>goal</th><th></th></tr>{''.join(rows)}</table>"


def _row(bench: str, figure: dict[str, Any]) -> str:
    goal = verdict = ""
    if figure["goal"] is not None:
        goal = f"{'≥' if figure['more_is_better'] else '≤'} {figure['goal']:g} {figure['unit']}"
        verdict = '<span class="good">met</span>' if figure["met"] else f'<span class="bad">missed by {figure["missed_by"]:.0%}</span>'
    return (
        f'<tr><td>{escape(bench)}</td><td>{escape(figure["name"])}</td><td class="n">{figure["value"]:.3g} {escape(figure["unit"])}</td>'
        f'<td class="n">{escape(goal)}</td><td>{verdict}</td></tr>'
        + (f'<tr><td></td><td colspan="4">{escape(figure["why"])}</td></tr>' if figure.get("why") and not figure["met"] else "")
    )


def _section(document: dict[str, Any]) -> str:
    machine = document["machine"]
    at = datetime.datetime.fromtimestamp(machine["at_ns"] / 1e9, datetime.UTC)
    said = (
        f"{machine['cores']} cores ({machine['cpu'] or 'unnamed'}), {machine['memory_mib']:,} MiB, Linux {machine['kernel']}, "
        f"Python {machine['python']}; {at:%Y-%m-%d %H:%M} UTC, load {machine['load']:.1f} at the begin"
        f"{', a busy machine' if machine['load'] > machine['cores'] else ''}{', short form' if document['short'] else ''}."
    )
    rows = [_row(document["bench"], figure) for figure in document["figures"]]
    draw = _DRAWN.get(document["bench"].split("-")[0], _nothing)
    return f"<h2>{escape(document['bench'])}</h2><p>{escape(said)}</p>{draw(document['measured'])}{_table(rows)}"


def _cycle(measured: dict[str, Any]) -> str:
    drawn = []
    for each in measured["workloads"]:
        title = f"{each['workload']}: {each['says']}, on {each['filesystem']}"
        drawn.append(plots.bars(f"{title}. Seconds of each round, and their median.", each["seconds"], "s"))
        wire = {name: [of / 2**20 for of in values] for name, values in each["wire_bytes"].items()}
        drawn.append(plots.bars("Bytes on the wire, headers, SSH and TLS included.", wire, "MiB"))
        drawn.append(plots.stacked("Landfall's cycles: where the seconds went.", [cycle["stages"] for cycle in each["cycles"]], "s"))
    return "".join(drawn)


def _order_curves(measured: dict[str, Any]) -> str:
    lines = {each["order"]: (each["bytes_sent"], each["whole_files"]) for each in measured["curves"]}
    return plots.lines("Whole files (up) against bytes sent (right): what could be recovered if the primary died at that byte.", lines)


def _recovery(measured: dict[str, Any]) -> str:
    counts = f"{measured['files']:,} files, {measured['changed']:,} changed, {measured['not_whole']:,} of them not whole"
    drawn = [plots.bars(f"{counts}, on {measured['filesystem']}. Seconds of each round, and their median.", measured["seconds"], "s")]
    for way, steps in measured["steps"].items():
        drawn.append(plots.stacked(f"Where the seconds of {way} went, on average.", [steps], "s"))
    return "".join(drawn)


def _scattered(measured: dict[str, Any]) -> str:
    return plots.bars(f"Reads of 4 KiB a second at depth {measured['depth']}.", measured["per_s"], "/s")


def _one_each(caption: str, key: str, unit: str) -> Callable[[dict[str, Any]], str]:
    return lambda measured: plots.bars(caption, {name: [value] for name, value in measured[key].items()}, unit)


def _foreground(measured: dict[str, Any]) -> str:
    return plots.bars("Foreground reads and writes a second, alone and while a cycle runs.", measured["iops"], "/s")


def _owners(measured: dict[str, Any]) -> str:
    caption = (
        f"{measured['files']:,} files on {measured['filesystem']}, {measured['pieces']:,} pieces. Seconds of each round, and their median."
    )
    return plots.bars(caption, measured["seconds"], "s")


def _freeze(measured: dict[str, Any]) -> str:
    points = measured["points"]
    ways = {
        way: ([point["extents"] for point in points], [statistics.median(point["frozen_ms"][way]) for point in points])
        for way in points[0]["frozen_ms"]
    }
    return plots.lines(f"Milliseconds of the freeze (up) against extents of the image (right, of {points[-1]['extents']:,}).", ways)


def _nothing(measured: dict[str, Any]) -> str:
    return ""


_DRAWN: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "cycle": _cycle,
    "owners": _owners,
    "freeze": _freeze,
    "order": _order_curves,
    "recovery": _recovery,
    "scattered": _scattered,
    "copy": _one_each("Sequential copy, device to device.", "mb_per_s", "MB/s"),
    "transfer": _one_each("A whole transfer over TLS on loopback.", "mb_per_s", "MB/s"),
    "foreground": _foreground,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
