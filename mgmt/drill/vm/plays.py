"""Playbooks through ansible-runner: what they do is heard as it happens, and what they said is kept in a folder of the run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any, Final

import ansible_runner

from agent.contract.errors import CommandFailed
from agent.system.clock import monotonic_s

POLL_S: Final = 0.05
PLAY_LIMIT_S: Final = 2400.0


@dataclass(frozen=True, slots=True)
class Task:
    """A task that begins, or one that failed."""

    play: str
    name: str
    host: str = ""
    failure: str = ""


Hear = Callable[[Task], None]


def _new(folder: Path, name: str) -> str:
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(one for one in names if not (folder / one).exists())


class Playing:
    """A playbook under way."""

    def __init__(self, playbook: Path, inventory: Path, folder: Path, *, tags: str, variables: Mapping[str, Any], hear: Hear) -> None:
        """Begin; what Ansible prints and every event of it go to ``folder/artifacts/TAGS``, and where that was played before, TAGS-2."""
        self._hear, self._folder, self._name = hear, folder, f"{playbook.name} ({tags})"
        self._failed: list[Task] = []
        self._cancelled = Event()
        self._sockets = TemporaryDirectory(prefix="landfall-", ignore_cleanup_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        settings = playbook.parent / "ansible.cfg"
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "ANSIBLE_HOME": str(folder.resolve() / "ansible"),
            # Connections of its own: those of another run may lead to a machine that has been switched off since. A socket's path is short.
            "ANSIBLE_SSH_CONTROL_PATH_DIR": self._sockets.name,
            "ANSIBLE_TIMEOUT": "180",  # an emulated machine on a busy host takes its time to become root
            **({"ANSIBLE_CONFIG": str(settings.resolve())} if settings.exists() else {}),
        }
        self._thread: Thread
        self._thread, self._runner = ansible_runner.run_async(
            private_data_dir=str(folder.resolve()),
            playbook=str(playbook.resolve()),
            inventory=str(inventory.resolve()),
            tags=tags,
            ident=_new(folder / "artifacts", tags),
            extravars=dict(variables),
            envvars=environment,
            event_handler=self._on_event,
            cancel_callback=self._cancelled.is_set,
            quiet=True,
        )

    @property
    def under_way(self) -> bool:
        """Whether it still plays; waits a moment for its end."""
        self._thread.join(POLL_S)
        return self._thread.is_alive()

    def finish(self, limit_s: float = PLAY_LIMIT_S) -> None:
        """Return when it has ended well; CommandFailed with the failed task's words otherwise, or if it takes too long."""
        until = monotonic_s() + limit_s
        while self.under_way:
            if monotonic_s() > until:
                self.cancel()
                raise CommandFailed(f"{self._name} did not end in {limit_s:g} s", fix=self._fix)
        if self._runner.status != "successful":
            words = "; ".join(f"{task.host}: {task.name}: {task.failure}" for task in self._failed) or self._last_words()
            raise CommandFailed(f"{self._name} ended as {self._runner.status}", cause=words[:2000], fix=self._fix)

    def cancel(self) -> None:
        """End it now; what Ansible had started on the nodes may go on."""
        self._cancelled.set()
        self._thread.join()

    @property
    def _fix(self) -> str:
        return f"All that Ansible said is in {os.path.relpath(self._folder)}."

    def _last_words(self) -> str:
        return "".join(self._runner.stdout.readlines()[-12:]) if self._runner.stdout else ""

    def _on_event(self, event: dict[str, Any]) -> bool:
        """Pass on what a person would want to hear; called in the runner's own thread. The event is kept in any case."""
        data = event.get("event_data", {})
        play, name, host = (str(data.get(key, "")) for key in ("play", "task", "host"))
        match event.get("event"):
            case "playbook_on_task_start":
                self._hear(Task(play, name))
            case "runner_on_failed" | "runner_on_unreachable" if not data.get("ignore_errors"):
                result = data.get("res", {})
                failure = str(result.get("stderr") or result.get("msg") or "").strip()[-1000:]
                task = Task(play, name, host, failure or "failed")
                self._failed.append(task)
                self._hear(task)
        return True
