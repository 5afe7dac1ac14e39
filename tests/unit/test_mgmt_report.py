"""The loss statement and its skins."""

from __future__ import annotations

import io
import json
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from agent.contract.dmi import Change
from agent.contract.identity import GenerationKind
from agent.contract.messages import Deletions, FileOutcome, GenerationFacts, Outcome, Salvaged
from mgmt.determination import AtomicSet, Policy, determine
from mgmt.report import Circumstances, LossStatement, Seconds, state
from mgmt.view import from_json, plain_lines, print_table, summary, to_html, to_json, visible
from tests.unit.mgmt_dmis import TARGET, File, arrived, make

AROUND = Circumstances("nas1", "nas2", "root@mgmt", 10**18, "0.1.0")
HOSTILE = [
    b"line\nbreak",
    b"esc\x1b[2Jape",
    b"\xff\xfe",
    "turn\u202eed".encode(),
    b"</script><script>alert(1)</script>",
    b"tab\there",
    b"back\\slash",
]


def statement(salvaged: Salvaged | None = None, policy: Policy | None = None) -> LossStatement:
    listed = [
        *(File((name,), needs=(0,), size=5) for name in HOSTILE),
        File((b"new",), Change.NEW | Change.CONTENT, needs=(0, 1), size=7000),
        File((b"old",), needs=(1,), size=9000),
        File((b"renamed",), Change.NAMES, base_paths=(b"former",), size=3),
        File((b"gone",), Change.DELETED),
        File((b"open",), Change.NEW | Change.NAMELESS, needs=(1,)),
    ]
    dmi = make(listed, 2, blocks=2)
    record = arrived(dmi, [3, 1])
    return state(dmi, record, determine(dmi, record, policy or Policy()), AROUND, Seconds(1.0, 0.5, 2.0), salvaged=salvaged)


def salvaged_with(*exceptions: FileOutcome) -> Salvaged:
    return Salvaged(GenerationFacts(TARGET, GenerationKind.SALVAGED, 10**18, TARGET), exceptions, 7, 35, 2.0)


def test_every_changed_file_is_named_and_the_totals_add_up() -> None:
    made = statement()
    counts = made.files
    assert len(made.accounts) == counts.changed == len(HOSTILE) + 4
    assert counts.recovered + counts.kept_at_base + counts.absent + counts.damaged + counts.deleted + counts.held == counts.changed
    assert (counts.absent, counts.kept_at_base, counts.held) == (1, 1, 1)
    by_path = {account.paths[0]: account for account in made.accounts}
    assert by_path["renamed"].base_paths == ("former",)
    assert "(1 of 2 pieces missing)" in by_path["new"].reason
    assert (made.bytes.changed, made.bytes.arrived) == (2 * 2 * 4096, 2 * 4096)
    assert not made.complete


def test_what_the_secondary_says_of_a_file_stands_above_the_verdict() -> None:
    made = statement(
        salvaged_with(FileOutcome(0, Outcome.DAMAGED, "it reads back wrong"), FileOutcome(10, Outcome.HELD, "taken", ".landfall-held/gone"))
    )
    assert made.accounts[0].outcome is Outcome.DAMAGED
    assert made.files.damaged == 1
    assert made.accounts[10].found_at == ".landfall-held/gone"
    assert made.generation == TARGET


def test_json_comes_back_as_it_was() -> None:
    made = statement(salvaged_with(), Policy(Deletions.APPLY, (AtomicSet("s", ("old", "new")),)))
    text = to_json(made)
    assert text.isascii()
    assert from_json(text) == made


@given(st.text(max_size=20) | st.binary(max_size=20).map(lambda raw: raw.decode("utf-8", "surrogateescape")))
def test_G17_what_is_shown_of_a_name_is_printable_and_tells_names_apart(name: str) -> None:
    shown = visible(name)
    assert all(character == " " or unicodedata.category(character)[0] not in "CZ" for character in shown)
    assert visible(name + "\n") != visible(name + "\\n")
    assert visible(name + "\x1b") != shown


@pytest.mark.parametrize("terminal", [True, False])
def test_G17_nothing_of_a_name_acts_on_the_terminal(terminal: bool) -> None:
    out = io.StringIO()
    print_table(statement(), Console(file=out, force_terminal=terminal, no_color=True, width=200, _environ={}), rows=3)
    text = re.sub("\x1b\\[[0-9;]*m", "", out.getvalue())
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert not re.search("[\ud800-\udfff]", text)
    assert summary(statement()) in text


def test_in_a_pipe_every_file_has_one_line_of_four_fields() -> None:
    lines = [line for line in plain_lines(statement()) if not line.startswith("#")]
    assert len(lines) == statement().files.changed
    assert all(len(line.split("\t")) == 4 and "\n" not in line for line in lines)


def test_G17_the_page_keeps_names_from_becoming_markup_and_asks_nothing_of_the_network() -> None:
    page = to_html(statement(salvaged_with(), Policy(atomic_sets=(AtomicSet("<b>", ("old",)),))))
    assert "alert(1)</script>" not in page
    assert "<b>:" not in page
    assert not re.search(r"(src|href)\s*=|url\(|https?:", page)
    assert "\x1b" not in page
    page.encode("utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    assert len(json.loads(found[1])["rows"]) == statement().files.changed
    assert "prefers-color-scheme: dark" in page
    assert page.count("<rect") >= 2


def test_the_picture_shows_the_piece_that_is_missing() -> None:
    assert [cell for cell in statement().picture.by_address if cell >= 0] == [500]


def test_the_picture_in_send_order_is_whole_up_to_where_it_broke_off() -> None:
    listed = [File((f"f{number}".encode(),), needs=(number,)) for number in range(8)]
    listed.append(File((b"wanted first",), needs=tuple(range(8, 16))))
    dmi = make(listed, 16, blocks=256)
    record = arrived(dmi, [3] * 4 + [0] * 4 + [3] * 8)
    found = determine(dmi, record, Policy())
    plain, wanted = (
        state(dmi, record, found, AROUND, Seconds(0, 0, 0), priorities=first).picture for first in ((), (("wanted first", 1),))
    )
    assert plain.by_send_order == (1000,) * 4 + (0,) * 4 + (1000,) * 8
    assert wanted.by_send_order == (1000,) * 12 + (0,) * 4
