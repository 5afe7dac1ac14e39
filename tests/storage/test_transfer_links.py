"""Bad links: cut, damaged, silent one way or both, at any byte; a resume sends what is missing and nothing else."""

from pathlib import Path

import numpy as np
import pytest

from agent.contract.errors import LinkLost
from agent.contract.messages import Differential, Sent
from agent.system.clock import monotonic_s
from agent.transfer.receiver import Received
from tests.relay import Relay
from tests.transfer_scene import Scene, make_differential, transfer_threads


@pytest.mark.parametrize("differential", list(Differential))
@pytest.mark.parametrize("seed", range(12))
def test_A6_D1_a_cut_at_any_byte_leaves_what_was_recorded_and_a_resume_sends_only_the_rest(
    tmp_path: Path, seed: int, differential: Differential
) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, seed=seed, blocks=1024, pieces=40))
    dmi = scene.differential.dmi
    relay = Relay(cut_at=int(np.random.default_rng(seed).integers(0, scene.data_bytes())))
    both = {"differential": differential, "streams": 1 + seed % 3}
    sent, received = scene.transfer(both=both, through=relay.before)
    assert isinstance(sent, LinkLost), sent
    assert isinstance(received, LinkLost), received
    assert scene.committed == 0
    assert transfer_threads() == []
    had = scene.check_recorded()

    sent, received = scene.transfer(both=both)
    assert isinstance(sent, Sent), sent
    assert (sent.pieces_skipped, sent.pieces_sent) == (had, dmi.piece_total - had)
    scene.check_landed()
    assert scene.committed == 1


@pytest.mark.parametrize("seed", range(6))
def test_D10_a_changed_byte_breaks_the_link_and_lands_nowhere(tmp_path: Path, seed: int) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, seed=seed, blocks=512, pieces=20))
    relay = Relay(flip_at=int(np.random.default_rng(seed).integers(3000, scene.data_bytes())))
    sent, received = scene.transfer(through=relay.before)
    assert isinstance(sent, LinkLost), sent
    assert isinstance(received, LinkLost), received
    scene.check_recorded()
    sent, _ = scene.transfer()
    assert isinstance(sent, Sent), sent
    scene.check_landed()


@pytest.mark.parametrize("way", ["stall", "mute"])
def test_D2_D3_a_link_that_goes_silent_is_noticed_by_both_sides(tmp_path: Path, way: str) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=1024, pieces=40))
    relay = Relay(stall_at=300_000) if way == "stall" else Relay(mute_at=300_000)
    begun = monotonic_s()
    sent, received = scene.transfer(both={"silence_limit_s": 2.5}, through=relay.before)
    assert isinstance(sent, LinkLost), sent
    assert isinstance(received, LinkLost), received
    assert monotonic_s() - begun < 15
    assert scene.committed == 0


def test_A9_an_acknowledgement_lost_after_the_commit_leaves_the_target_committed(tmp_path: Path) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=256, pieces=10))
    relay = Relay()
    commit = scene.receive_job().commit

    def commit_and_mute() -> None:
        commit()
        relay.mute_at = 0

    sent, received = scene.transfer(both={"silence_limit_s": 2.0}, receiving={"commit": commit_and_mute}, through=relay.before)
    assert isinstance(sent, LinkLost), sent
    assert isinstance(received, Received), received
    sent, _ = scene.transfer(receiving={"committed": True})
    assert isinstance(sent, Sent), sent
    assert (sent.pieces_sent, scene.committed) == (0, 1)
