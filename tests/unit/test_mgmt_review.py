"""What a management node must not order, though the agents would do it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from uuid import UUID

import pytest

from agent.contract import messages as m
from agent.contract.errors import LayoutUnsupported, NodeUnreachable, NoSuchTransfer
from agent.contract.identity import GenerationKind, empty_generation
from mgmt import run
from mgmt.run import Site
from tests.unit.mgmt_pair import Pair, S


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def ack_lost(pair: Pair, site: Site) -> UUID:
    """Leave a transfer that the secondary has committed and of which the primary knows that it broke off."""
    pair.with_volume(site)
    transfer = run.replicate(site, "projects").transfer
    pair.transfers["nas1"][transfer] = dataclasses.replace(pair.transfers["nas1"][transfer], state=S.INTERRUPTED)
    return transfer


def test_A9_what_the_secondary_has_committed_is_not_discarded_on_the_primary(pair: Pair) -> None:
    """The primary would drop the only generation that both have, and no base would fit ever again."""
    with pair.site() as site:
        transfer = ack_lost(pair, site)
        with pytest.raises(NoSuchTransfer):
            run.discard(site, "projects")
        assert transfer in pair.transfers["nas1"]
        assert run.replicate(site, "projects").base.counter == 1


def test_A9_whether_the_secondary_has_committed_must_be_known(pair: Pair) -> None:
    def die(_: m.ListVolumes) -> m.Volumes:
        raise EOFError

    with pair.site() as site:
        transfer = ack_lost(pair, site)
        pair.nas2.handlers[m.ListVolumes] = die
        with pytest.raises(NodeUnreachable):
            run.discard(site, "projects")
        assert transfer in pair.transfers["nas1"]


def test_after_a_failover_what_the_old_primary_never_sent_can_be_given_up(pair: Pair) -> None:
    """It holds the generation itself, as it froze it; that is not to be taken for one that arrived."""
    with pair.site() as site:
        transfer = ack_lost(pair, site)
        pair.generations["nas2"].pop()
        del pair.transfers["nas2"][transfer]
        site.catalog.set_volume(dataclasses.replace(site.catalog.volume("projects"), primary="nas2", secondary="nas1"))
        assert run.discard(site, "projects") == [(transfer, "nas1")]


def test_a_volume_whose_making_broke_off_is_made_when_it_is_added_again(pair: Pair) -> None:
    def make_half(asked: m.CreateVolume) -> m.VolumeFacts:
        pair.generations["nas1"] = [m.GenerationFacts(empty_generation(asked.volume), GenerationKind.EMPTY, 0)]
        pair.serving["nas1"] = False
        pair.create(asked)
        raise EOFError

    pair.nas1.handlers[m.CreateVolume] = make_half
    with pair.site() as site:
        with pytest.raises(NodeUnreachable):
            pair.with_volume(site)
        pair.nas1.dead, pair.nas1.handlers[m.CreateVolume] = False, pair.create
        pair.with_volume(site)
        assert len(pair.nas1.said(m.CreateVolume)) == 2


def test_orders_that_are_refused_do_not_pile_up_generations_on_the_primary(pair: Pair) -> None:
    def refuse(_: m.BuildTransfer) -> m.Built:
        raise LayoutUnsupported("as the script says")

    with pair.site() as site:
        pair.with_volume(site)
        run.replicate(site, "projects")
        build, pair.nas1.handlers[m.BuildTransfer] = pair.nas1.handlers[m.BuildTransfer], refuse
        for _ in range(3):
            with pytest.raises(LayoutUnsupported):
                run.replicate(site, "projects")
        assert [facts.id.counter for facts in pair.generations["nas1"]] == [1]
        pair.nas1.handlers[m.BuildTransfer] = build
        assert run.replicate(site, "projects").base.counter == 1
