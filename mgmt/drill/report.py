"""The drill's report: one document, and a table of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from agent.system.files import write_durably
from mgmt.drill.course import Course
from mgmt.drill.options import Options
from mgmt.report import LossStatement
from mgmt.view import to_html, to_json


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
        "kill": str(options.kill),
        "differential": str(options.differential),
        "at": options.at,
        "killed_at": round(course.killed_at, 4),
        "resumed": course.resumed,
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
            report["seconds"] |= {"fence": round(spent.fence, 3), "serve": round(spent.serve, 3), "total": round(spent.total, 3)}
    elif facts is not None:
        whole = {"changed": facts.files_total, "recovered": facts.files_whole, "kept_at_base": 0, "absent": 0, "damaged": 0}
        report["files"] = whole
        report["bytes"] = {"changed": facts.bytes_total, "arrived": facts.bytes_arrived, "sent": course.bytes_sent}
        report["seconds"] = {"detect": round(course.detect_s, 3), "determine": 0.0, "recover": 0.0}
    checked = asdict(findings) if findings is not None else {"false_recovered": 0, "missed": 0, "untouched_differ": 0, "images_equal": True}
    report["check"] = checked
    return report


def sentence(options: Options, course: Course) -> str:
    """Return the drill's outcome in one sentence."""
    if course.statement is None:
        resumed = course.resumed[-1] if course.resumed else {"pieces_skipped": 0}
        return f"resumed: {resumed['pieces_skipped']:,} pieces were not sent again, both volumes are equal block by block"
    files, findings = course.statement.files, course.findings
    share = 100 * files.recovered / max(files.recovered + files.kept_at_base + files.absent + files.damaged, 1)
    verdict = "the checker found nothing amiss" if findings is not None and findings.clean else "THE CHECKER FOUND FAULTS"
    away = f", served {course.failover.seconds.total:.1f} s after the kill" if course.failover is not None else ""
    return (
        f"killed at {100 * course.killed_at:.0f} % of the bytes: {files.recovered:,} of {files.changed:,} changed files recovered "
        f"({share:.1f} % of those to recover){away}; {verdict}"
    )
