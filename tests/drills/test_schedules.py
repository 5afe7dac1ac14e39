"""A few of the simulation's schedules on a lab; ``make schedules`` plays fifty."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mgmt.lab.layout import Lab
from tests.drills.schedules import MGMT, lab_for_schedules, play
from tests.simulation.schedule import schedule


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with lab_for_schedules() as made:
        yield made


@pytest.fixture(scope="module")
def configuration(lab: Lab) -> str:
    return (lab.node(MGMT) / "etc" / "landfall.toml").read_text()


@pytest.mark.parametrize("seed", [11, 12])
def test_I7_one_writer_on_the_nodes_of_a_lab(lab: Lab, configuration: str, seed: int) -> None:
    played = play(lab, schedule(seed), configuration)
    assert not played.wrong, "\n".join((*played.log, *played.wrong))
