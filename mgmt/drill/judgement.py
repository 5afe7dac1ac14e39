"""What came of a drill, held against what its scenario expects. Pure."""

from __future__ import annotations

from mgmt.drill.course import Course
from mgmt.drill.scenario import Expectation, Verdict


def verdict(course: Course) -> Verdict:
    """Return what came of it."""
    if course.statement is not None:
        sound = course.findings is not None and course.findings.clean and course.statement.files.recovered > 0
        return Verdict.RECOVERED if sound else Verdict.FAILED
    return Verdict.RESUMED if course.resumed else Verdict.FAILED


def rpo_s(course: Course) -> float | None:
    """Return how old recovered files are, in seconds before the loss; 0 where nothing was lost, None if nobody measured."""
    if course.failover is not None:
        return course.failover.lost.recovered
    return 0.0 if course.resumed else None


def rto_s(course: Course) -> float | None:
    """Return the seconds without a service; 0 where there was no failover, None if nobody measured."""
    if course.failover is not None:
        return course.failover.seconds.total
    return 0.0 if course.resumed else None


def shortfalls(course: Course, expect: Expectation, patience: float = 1.0) -> tuple[str, ...]:
    """Return in words what is not as it should be; what was not looked at (a lab without a client) is not judged.

    All times may be ``patience`` as long as is expected.
    """
    found, rpo_limit_s, rto_limit_s = [], patience * expect.rpo_s, patience * expect.rto_s
    came_of_it = verdict(course)
    if course.findings is not None and not course.findings.clean:
        found += [f"the checker: {words}" for words in course.findings.first[:5]]
    if came_of_it is not expect.verdict:
        found.append(f"the verdict is {came_of_it}, not {expect.verdict}")
    if course.serves is not None and course.serves != (expect.serves,):
        found.append(f"{' and '.join(course.serves) or 'nobody'} serves, not {expect.serves} alone")
    if (age_s := rpo_s(course) or 0.0) > rpo_limit_s:
        found.append(f"recovered files are {age_s:.1f} s old, at most {rpo_limit_s:g} s are allowed")
    recovery_s = course.failover.seconds.recover if course.failover is not None else 0.0
    if (away_s := (rto_s(course) or 0.0) - recovery_s) > rto_limit_s:
        found.append(f"{away_s:.1f} s without a service beside the recovery, at most {rto_limit_s:g} s are allowed")
    if course.client is not None:
        if any(gap.seconds is None for gap in course.client.gaps):
            found.append("an SMB client lost its files and never got them back at the same address")
        elif not min(expect.gaps, 1) <= len(course.client.gaps) <= expect.gaps:
            found.append(f"an SMB client lost its files {len(course.client.gaps)} times, where {expect.gaps} were expected at most")
    return tuple(found)
