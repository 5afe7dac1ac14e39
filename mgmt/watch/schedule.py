"""When a volume is due: systemd's calendar expressions, asked of systemd itself.

The words are those that administrators write into timers (systemd.time(7), "Calendar events"); `systemd-analyze calendar` knows them all,
time zones included, and works where systemd does not run.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache

from agent.contract.errors import CommandFailed, ConfigInvalid
from agent.system.run import run

_ELAPSE = re.compile(r"^ *(?:Next elapse|\(in UTC\)): \w{3} (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.\d+)? UTC$", re.MULTILINE)


@lru_cache(maxsize=1024)
def next_due_ns(schedule: str, after_s: int) -> int | None:
    """Return the first time after ``after_s`` (seconds since the epoch) that ``schedule`` names, in ns; None if there is none.

    ConfigInvalid if systemd does not understand it; ProgramMissing without systemd-analyze.
    """
    base = datetime.fromtimestamp(after_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    try:
        said = run(["systemd-analyze", "calendar", f"--base-time={base}", "--iterations=1", "--", schedule], timeout_s=10.0).text
    except CommandFailed as error:
        raise ConfigInvalid(
            f"{schedule!r} is no calendar expression", cause=error.cause, fix="Write it as in a systemd timer, such as hourly or *:0/15."
        ) from error
    found = _ELAPSE.search(said)
    if found is None:
        return None
    return int(datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp()) * 10**9
