"""Scenarios are read strictly, and what came of a drill is held against them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from click.testing import CliRunner

from agent.contract.errors import ConfigInvalid
from mgmt.cli import landfall
from mgmt.drill import judgement, scenario
from mgmt.drill.cli import KILLS, keep
from mgmt.drill.course import Course
from mgmt.drill.evidence import Findings
from mgmt.drill.onlooker import Gap, Seen
from mgmt.drill.options import LabKind
from mgmt.drill.scenario import Blow, Expectation, Failover, Fault, Interrupt, Mend, Notified, Repair, Resume, Verdict
from mgmt.failover.account import Lost, Phases
from mgmt.proofs import Proof

GOOD = """
says: the link is cut, and healed
steps:
  - interrupt:
      - {at: 0.25, fault: management-power-cut}
      - {at: 0.5, fault: link-cut}
  - notified
  - repair: heal-link
  - resume
  - interrupt: [{at: 0.5, fault: source-power-cut}]
  - failover: {dies_after: fence}
  - failover
expect: {verdict: recovered, serves: nas2, gaps: 1, rpo_s: 600, rto_s: 30}
"""


def read(folder: Path, text: str) -> scenario.Scenario:
    (folder / "tried.yml").write_text(text)
    return scenario.read("tried", folder)


def test_a_scenario_is_what_its_file_says(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD)
    assert found.steps == (
        Interrupt((Blow(0.25, Fault.MANAGEMENT_POWER_CUT), Blow(0.5, Fault.LINK_CUT))),
        Notified(),
        Mend(Repair.HEAL_LINK),
        Resume(),
        Interrupt((Blow(0.5, Fault.SOURCE_POWER_CUT),)),
        Failover(dies_after="fence"),
        Failover(),
    )
    assert (found.name, found.labs, found.share) == ("tried", (LabKind.LOCAL,), 0.5)


def test_a_word_for_what_dies_is_a_scenario_of_the_local_lab_and_does_not_go_with_another() -> None:
    assert {word: LabKind.LOCAL in scenario.read(name).labs for word, name in KILLS.items()} == dict.fromkeys(KILLS, True)
    said = CliRunner().invoke(landfall, ["drill", "--kill", "link", "--scenario", "link-cut"])
    assert said.exit_code == 2
    assert "use one of them" in said.output


def test_a_history_that_cannot_be_written_is_told_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "build").write_text("no folder")
    monkeypatch.chdir(tmp_path)
    keep(Mock(path=tmp_path / "landfall.toml"), Proof(1, "source-killed", "", "recovered", True, 1.0, 2.0, "", "went well"))
    assert "the drill is not in the history" in capsys.readouterr().err


def test_the_shipped_ones_can_be_read_and_every_fault_and_repair_is_in_one() -> None:
    shipped = [scenario.read(name) for name in scenario.names()]
    assert {found.name for found in shipped} >= {"source-killed", "source-lost", "lost-sight"}
    steps = [step for found in shipped for step in found.steps]
    dealt = {blow.fault for step in steps if isinstance(step, Interrupt) for blow in step.blows}
    assert dealt == set(Fault)
    assert {step.repair for step in steps if isinstance(step, Mend)} == set(Repair)
    assert all(set(found.labs) == set(LabKind) for found in shipped)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("says:", "said:", "unknown key said"),
        ("says: the link is cut, and healed", "", "key says is missing"),
        ("fault: link-cut", "fault: flood", r"'flood' must be one of .* @ \$\.steps\[0\]\.blows\[1\]\.fault"),
        ("at: 0.25", "at: 0.75", r"steps\[0\]: at must rise"),
        ("at: 0.25", "at: 0", r"steps\[0\]: at must rise"),
        ("at: 0.25", "at: '0.25'", "is str, it must be float"),
        ("[{at: 0.5, fault: source-power-cut}]", "[]", r"steps\[4\]: at must rise"),
        ("- resume\n", "- wait\n", "'wait' is no step"),
        ("- resume\n", "- {resume: {}, wait: {}}\n", "its only key"),
        ("- resume\n", "- resume: [1]\n", "must be a mapping"),
        ("dies_after: fence", "dies_after: lunch", "dies_after: must be one of"),
        ("dies_after: fence", "dies_after: fence, refused: x", "cannot be killed"),
        ("dies_after: fence", "declare_dead: 'yes'", "is str, it must be bool"),
        ("verdict: recovered", "verdict: resumed", "is not what the steps lead to"),
        ("serves: nas2", "serves: nas3", "must be nas1 or nas2"),
        ("rpo_s: 600", "rpo_s: -1", "below 0"),
        ("gaps: 1", "gaps: 1, gaps: 2", "key gaps stands twice"),
        ("says:", "- says:", "cannot be read as YAML"),
        ("says: the link is cut, and healed", "says: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    ],
)
def test_G16_what_is_wrong_is_named_with_its_place(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigInvalid, match=words) as refused:
        read(tmp_path, GOOD.replace(old, new))
    assert "tried.yml" in str(refused.value)


def test_a_name_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "tried.yml").write_text(GOOD)
    for name in ("../tried", "/etc/passwd", "tried.yml", ""):
        with pytest.raises(ConfigInvalid, match="One of tried"):
            scenario.read(name, tmp_path)


def test_another_share_is_for_transfers_to_which_one_thing_happens(tmp_path: Path) -> None:
    assert scenario.read("link-cut").at(0.7).share == 0.7
    with pytest.raises(ConfigInvalid, match="Leave --at away"):
        read(tmp_path, GOOD).at(0.7)


# --- the judgement ---

EXPECT = Expectation(Verdict.RECOVERED, "nas2", 1, rpo_s=60, rto_s=10)
CLEAN = Findings(0, 0, 0, 0, 100, 1000, ())


def course(**changes: Any) -> Course:
    """Return the course of a drill in which everything went well: 11 s, 4 of them to recover the data."""
    held = Course(
        statement=Mock(files=Mock(recovered=7)),
        failover=Mock(seconds=Phases(3.0, 1.0, 0.5, 4.0, 2.0, 0.5), lost=Lost(50.0, 20.0, 50.0)),
        findings=CLEAN,
        serves=("nas2",),
        client=Seen(40, 2, (Gap(5.0, 16.0),)),
    )
    for name, value in changes.items():
        setattr(held, name, value)
    return held


def test_a_drill_that_went_well_falls_short_of_nothing() -> None:
    assert judgement.shortfalls(course(), EXPECT) == ()
    assert (judgement.verdict(course()), judgement.rto_s(course()), judgement.rpo_s(course())) == (Verdict.RECOVERED, 11.0, 20.0)
    resumed = course(statement=None, failover=None, findings=None, resumed=[{}], serves=("nas1",), client=Seen(40, 1, ()))
    assert judgement.shortfalls(resumed, Expectation(Verdict.RESUMED, "nas1", 0, rpo_s=0, rto_s=0)) == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"findings": replace(CLEAN, false_recovered=1, first=("recovered: a: differs",))}, "recovered: a: differs"),
        ({"findings": None}, "the verdict is failed"),
        ({"statement": None}, "the verdict is failed"),
        ({"serves": ("nas1", "nas2")}, "nas1 and nas2 serves, not nas2 alone"),
        ({"serves": ()}, "nobody serves"),
        ({"failover": Mock(seconds=Phases(7.0, 1.0, 0.5, 4.0, 2.0, 0.5), lost=Lost(50.0, 20.0, 50.0))}, "11.0 s without a service"),
        ({"failover": Mock(seconds=Phases(3.0, 1.0, 0.5, 4.0, 2.0, 0.5), lost=Lost(90.0, 61.0, 90.0))}, "61.0 s old"),
        ({"client": Seen(40, 2, (Gap(5.0, None),))}, "never got them back"),
        ({"client": Seen(40, 3, (Gap(5.0, 16.0), Gap(18.0, 19.0)))}, "lost its files 2 times"),
        ({"client": Seen(40, 1, ())}, "lost its files 0 times"),
    ],
)
def test_I7_I9_what_is_not_as_it_must_be_is_said(changes: dict[str, Any], words: str) -> None:
    found = judgement.shortfalls(course(**changes), EXPECT)
    assert any(words in said for said in found), found
