"""The drill's report: one document, and a table of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from agent.system.files import write_durably
from mgmt.drill import judgement
from mgmt.drill.course import Course
from mgmt.drill.onlooker import Seen
from mgmt.drill.options import Options
from mgmt.report import LossStatement
from mgmt.view import to_html, to_json

PHASES: Final = ("detect", "fence", "determine", "recover", "serve", "waited")
"""From the loss to the served volume. ``waited``: nobody worked on it, as between a failover that was killed and its resumption."""


def keep(folder: Path, statement: LossStatement) -> None:
    """Write the loss statement below ``folder``, for programs and for people."""
    write_durably(folder / "loss.json", to_json(statement).encode(), mode=0o644)
    write_durably(folder / "report.html", to_html(statement).encode(), mode=0o644)


def document(options: Options, course: Course) -> dict[str, Any]:
    """Return report.json: what was asked, what died when, what became of the files, what the checker found."""
    statement, findings, facts = course.statement, course.findings, course.facts
    report: dict[str, Any] = {
        "lab": str(options.lab),
        "substrate": options.substrate,
        "fs": str(options.filesystem),
        "seed": options.seed,
        "scenario": options.scenario,
        "differential": str(options.differential),
        "at": options.at,
        "killed_at": round(course.killed_at, 4),
        "resumed": course.resumed,
        "verdict": str(judgement.verdict(course)),
        "rpo_s": _rounded(judgement.rpo_s(course)),
        "rto_s": _rounded(judgement.rto_s(course)),
        "serves": course.serves,
        "client": _client_document(course.client),
        "shortfalls": list(course.shortfalls),
    }
    if statement is not None:
        report["files"] = asdict(statement.files)
        report["bytes"] = {"changed": statement.bytes.changed, "arrived": statement.bytes.arrived, "sent": course.bytes_sent}
        report["seconds"] = {
            "detect": round(course.detect_s, 3),
            "determine": round(statement.seconds.determine, 3),
            "recover": round(statement.seconds.recover, 3),
        }
        if course.failover is not None:
            spent = course.failover.seconds
            report["seconds"] = {name: round(getattr(spent, name), 3) for name in (*PHASES, "total")}
    elif facts is not None:
        whole = {"changed": facts.files_total, "recovered": facts.files_whole, "kept_at_base": 0, "absent": 0, "damaged": 0}
        report["files"] = whole
        report["bytes"] = {"changed": facts.bytes_total, "arrived": facts.bytes_arrived, "sent": course.bytes_sent}
        report["seconds"] = {"detect": round(course.detect_s, 3), "determine": 0.0, "recover": 0.0}
    checked = asdict(findings) if findings is not None else {"false_recovered": 0, "missed": 0, "untouched_differ": 0, "images_equal": True}
    report["check"] = checked
    return report


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _client_document(seen: Seen | None) -> dict[str, Any] | None:
    if seen is None:
        return None
    lengths = [_rounded(gap.seconds) for gap in seen.gaps]
    return {"reads": seen.reads, "connections": seen.connections, "gaps_s": lengths}


def sentence(course: Course) -> str:
    """Return the drill's outcome in a few lines: what became of the files, what it cost, what a client saw, what is not as expected."""
    lines = [_files_line(course), _cost_line(course), _client_line(course.client)]
    lines += [f"NOT AS EXPECTED: {words}" for words in course.shortfalls]
    return "\n".join(line for line in lines if line)


def _files_line(course: Course) -> str:
    if course.statement is None:
        resumed = course.resumed[-1] if course.resumed else {"pieces_skipped": 0}
        return f"resumed: {resumed['pieces_skipped']:,} pieces were not sent again, both volumes are equal block by block"
    files, findings = course.statement.files, course.findings
    share = 100 * files.recovered / max(files.recovered + files.kept_at_base + files.absent + files.damaged, 1)
    found = "the checker found nothing amiss" if findings is not None and findings.clean else "THE CHECKER FOUND FAULTS"
    return (
        f"broken off at {100 * course.killed_at:.0f} % of the bytes: {files.recovered:,} of {files.changed:,} changed files recovered "
        f"({share:.1f} % of those to recover); {found}"
    )


def _cost_line(course: Course) -> str:
    if course.failover is None:
        return ""
    spent, lost = course.failover.seconds, course.failover.lost
    phases = ", ".join(f"{name} {getattr(spent, name):.1f}" for name in PHASES if name != "waited" or spent.waited >= 0.05)
    return f"RTO {spent.total:.1f} s: {phases}; RPO {lost.recovered:.1f} s of recovered files" + (
        f", {lost.others:.1f} s of the others" if lost.others != lost.recovered else ""
    )


def _client_line(seen: Seen | None) -> str:
    if seen is None:
        return ""
    lengths = " and ".join("ever" if gap.seconds is None else f"{gap.seconds:.1f} s" for gap in seen.gaps)
    return f"an SMB client read {seen.reads:,} times at the volume's address" + (
        f", and could not for {lengths}" if lengths else ", always"
    )
