"""The outbox keeps notifications until they are acknowledged, and never gives a number twice."""

from __future__ import annotations

import threading
from pathlib import Path
from uuid import UUID

from agent.service.outbox import Outbox

VOLUME, TRANSFER = UUID(int=1), UUID(int=2)


def test_a_notification_outlives_the_agent_until_it_is_acknowledged(tmp_path: Path) -> None:
    said = Outbox(tmp_path).put("reception-failure", VOLUME, TRANSFER, "the peer was silent")
    again = Outbox(tmp_path)
    assert again.read(0, 0) == (said,)
    assert again.read(0, 0) == (said,)
    again.acknowledge(said.sequence)
    assert again.read(0, 0) == ()
    assert Outbox(tmp_path).read(0, 0) == ()


def test_C3_numbers_go_on_after_everything_was_acknowledged(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    for _ in range(3):
        outbox.put("reception-failure", VOLUME, None, "")
    outbox.acknowledge(3)
    assert Outbox(tmp_path).put("reception-failure", VOLUME, None, "").sequence == 4


def test_who_waits_is_woken(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    heard: list[int] = []
    waiting = threading.Thread(target=lambda: heard.extend(said.sequence for said in outbox.read(0, 30)))
    waiting.start()
    outbox.put("reception-failure", VOLUME, None, "")
    waiting.join(10)
    assert heard == [1]


def test_a_write_that_was_broken_off_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".new-0123").write_bytes(b"{")
    assert Outbox(tmp_path).read(0, 0) == ()
    assert not list(tmp_path.glob(".new-*"))
