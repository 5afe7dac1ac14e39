"""Which management node this agent obeys: the one of the highest term it has heard of, across restarts."""

from __future__ import annotations

import threading
from pathlib import Path

from agent.contract.errors import RequestRefused, StaleTerm
from agent.system.failpoint import failpoint
from agent.system.files import write_durably

_BEYOND = 1 << 63


class Term:
    """The highest term heard, in the file ``path``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.highest = int(path.read_text()) if path.exists() else 0

    def admit(self, term: object, *, looking: bool) -> None:
        """Take note of a request's term; StaleTerm if it is not the highest heard and the request does more than look.

        A higher one is durable before anything is done in it. If we die before that, nothing was done.
        """
        if type(term) is not int or not 0 <= term < _BEYOND:
            raise RequestRefused(f"the term of a request is a number, not {term!r}"[:200])
        with self._lock:
            if term > self.highest:
                failpoint("term.before_record")
                write_durably(self._path, str(term).encode())
                failpoint("term.after_record")
                self.highest = term
            elif term < self.highest and not looking:
                raise StaleTerm(f"the order is of term {term}, this node has heard of term {self.highest}")
