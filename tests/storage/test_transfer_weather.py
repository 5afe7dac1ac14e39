"""Networks that lose packets, delay them, or drop the large ones: a transfer is slower, or says what is wrong; it never hangs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from agent.contract.errors import LinkLost
from agent.contract.messages import Sent
from agent.serving import path
from agent.system.clock import monotonic_s
from agent.system.run import run
from mgmt.lab.namespace import within
from tests.transfer_scene import Scene, make_differential, transfer_threads

MTU = 1500
SESSIONS = 12
DROP_LARGE = """table ip weather {
  chain out {
    type filter hook output priority 0;
    meta length > 1400 drop
  }
}
"""


@pytest.fixture
def network() -> Iterator[str]:
    """Yield a network namespace whose loopback is like a link: with an MTU for packets that are counted one by one."""
    name = f"weather-{uuid4().hex[:8]}"
    run(["ip", "netns", "add", name])
    try:
        run(["ip", "-n", name, "link", "set", "lo", "up", "mtu", str(MTU), "gso_max_segs", "1"])
        yield name
    finally:
        run(["ip", "netns", "delete", name])


@pytest.mark.netem
@pytest.mark.parametrize("loss", [1, 10, 30])
def test_D5_a_link_that_loses_packets_and_has_a_long_way_is_only_slower(network: str, tmp_path: Path, loss: int) -> None:
    """150 ms each way. Where a session breaks off all the same, what had arrived stays and the next goes on from there."""
    run(["tc", "-n", network, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "150ms", "loss", f"{loss}%", "limit", "10000"])
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=24, pieces=4, files=4), patience_s=30.0, limit_s=200.0)
    limits = {"silence_limit_s": 30.0, "connect_limit_s": 30.0}
    had = 0
    for _ in range(SESSIONS):
        sent, _ = within(network, lambda: scene.transfer(both=limits, receiving={"handshake_limit_s": 30.0}))
        if scene.committed:  # what the target said of it may be lost
            break
        assert isinstance(sent, LinkLost), sent
        before, had = had, scene.check_recorded()
        assert had >= before
    assert scene.committed == 1
    scene.check_landed()


def test_D11_a_way_that_drops_large_packets_is_said_and_nothing_hangs(network: str, tmp_path: Path) -> None:
    run(["ip", "netns", "exec", network, "nft", "-f", "-"], stdin=DROP_LARGE.encode())
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=1024, pieces=40))
    begun = monotonic_s()
    sent, received = within(network, lambda: scene.transfer(both={"silence_limit_s": 2.5, "connect_limit_s": 2.5}))
    assert isinstance(sent, LinkLost), sent
    assert isinstance(received, LinkLost), received
    assert monotonic_s() - begun < 40
    assert transfer_threads() == []
    assert scene.committed == 0
    scene.check_recorded()

    tried = within(network, lambda: path.attempt("127.0.0.1", path.listen("127.0.0.1", 20.0), 3.0))
    assert tried.problem == "connected, and then silence: large packets are dropped on the way"

    run(["ip", "netns", "exec", network, "nft", "flush", "ruleset"])
    sent, _ = within(network, scene.transfer)
    assert isinstance(sent, Sent), sent
    scene.check_landed()
    assert not within(network, lambda: path.attempt("127.0.0.1", path.listen("127.0.0.1", 20.0), 20.0)).problem
