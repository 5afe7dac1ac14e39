"""Both sides of a transfer over TLS on loopback: everything arrives, once, and what is missing is sent again."""

from pathlib import Path

import numpy as np
import pytest

from agent.contract.messages import Differential, Sent
from agent.transfer.receiver import Received
from tests.transfer_scene import Scene, make_differential, transfer_threads


@pytest.mark.parametrize("differential", list(Differential))
@pytest.mark.parametrize("streams", [1, 2, 3, 4])
def test_everything_arrives_and_is_committed_once(tmp_path: Path, differential: Differential, streams: int) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, seed=streams))
    sent, received = scene.transfer(both={"differential": differential, "streams": streams})
    assert isinstance(sent, Sent), sent
    assert isinstance(received, Received), received
    scene.check_landed()
    assert scene.committed == 1
    assert sent.pieces_sent == scene.differential.dmi.piece_total == received.pieces
    assert (sent.pieces_skipped, sent.healed, received.healed) == (0, 0, 0)
    assert received.bytes_received == pytest.approx(sent.bytes_sent, abs=200)
    assert transfer_threads() == []


def test_update_data_travels_once_and_differential_data_only_when_it_is_asked_for(tmp_path: Path) -> None:
    made = make_differential(tmp_path)
    amounts = {}
    for differential in Differential:
        folder = tmp_path / differential
        folder.mkdir()
        sent, _ = Scene(folder, made).transfer(both={"differential": differential})
        assert isinstance(sent, Sent), sent
        amounts[differential] = sent.bytes_sent
    dmi = made.dmi
    update = int(dmi.block_count[dmi.target_hole == 0].sum()) * 4096
    pre_image = int(dmi.block_count[dmi.diff_block != np.uint64(2**64 - 1)].sum()) * 4096
    assert update < amounts[Differential.VERIFY] < update * 1.05
    assert update + pre_image < amounts[Differential.SEND] < (update + pre_image) * 1.05
