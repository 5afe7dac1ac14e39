"""A reception always ends, whatever its peer is in a hurry to do."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.contract import frames
from agent.contract.errors import LandfallError, LinkLost
from agent.contract.frames import FrameType, Part
from agent.transfer.landing import Landing
from agent.transfer.receiver import Receiver
from tests.transfer_scene import Scene, make_differential
from tests.unit.test_transfer_tls import greet


def test_a_peer_that_sends_before_it_is_told_to_and_goes_away_does_not_hold_the_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=64, pieces=4), patience_s=0.5)
    offered, offer, encode = threading.Event(), Landing.offer, frames.encode

    def offer_and_tell(landing: Landing, batch: frames.Batch) -> None:
        offer(landing, batch)
        offered.set()

    def lose_the_first_stream(kind: FrameType, *arguments: Any) -> Any:
        if kind is FrameType.DMI_STORED:
            assert offered.wait(20)
            raise LinkLost("the first stream went away")
        return encode(kind, *arguments)

    monkeypatch.setattr(Landing, "offer", offer_and_tell)
    monkeypatch.setattr(frames, "encode", lose_the_first_stream)
    receiver = Receiver(scene.receive_job())
    ended = threading.Thread(target=_run, args=(receiver,), daemon=True)
    ended.start()
    first = greet(scene, receiver.port)
    assert first.receive().type is FrameType.WELCOME
    first.send(encode(FrameType.DMI, [scene.differential.raw]))
    hasty = None
    while hasty is None:
        stream = greet(scene, receiver.port, stream=1)
        with suppress(LinkLost):
            if stream.receive(5).type is FrameType.WELCOME:
                hasty = stream
                continue
        stream.close()
    hasty.send(frames.encode_batch(np.zeros(1, np.uint32), np.full(1, Part.UPDATE, np.uint8), 0, b"", compressed=False))
    ended.join(15)
    assert not ended.is_alive(), "the reception waits for ever"
    for stream in (first, hasty):
        stream.close()


def _run(receiver: Receiver) -> None:
    with suppress(LandfallError):
        receiver.run()


def test_I8_what_a_death_left_of_a_dmi_is_swept(tmp_path: Path) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=64, pieces=4))
    left = scene.store.folder(scene.differential.dmi.head.transfer) / ".new-0123"
    left.write_bytes(b"half of a DMI")
    Scene(tmp_path, scene.differential)
    assert not left.exists()
