"""The commands: what is data, what is talk, and how they end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from agent.contract.errors import LandfallError, LinkLost, NodeUnreachable, PrimaryAlive, by_code
from agent.contract.errors import explain as explain_code
from mgmt import run
from mgmt.cli import landfall
from mgmt.cli.place import Place
from mgmt.inventory import FenceOptions
from mgmt.run import replication
from tests.unit.mgmt_pair import Pair, die, lose
from tests.unit.test_mgmt_reach import line_of, new_key

GOLDEN_DMI = Path(__file__).parent / "golden" / "sample.dmi"


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    made = Pair(tmp_path)

    @contextmanager
    def site(_: Place) -> Iterator[run.Site]:
        with made.site() as opened:
            yield opened

    monkeypatch.setattr(Place, "site", site)
    monkeypatch.setattr(replication, "FIRST_PAUSE_S", 0.001)
    monkeypatch.delenv("LANDFALL_LAB", raising=False)
    return made


def ask(*words: str, error: type[BaseException] | None = None) -> Result:
    result = CliRunner().invoke(landfall, words)
    if error is None:
        assert result.exit_code == 0, (result.output, result.exception)
    else:
        assert isinstance(result.exception, error), (result.output, result.exception)
    return result


def data(*words: str) -> Any:
    return json.loads(ask(*words, "--json").stdout)


def test_the_cycle_from_the_command_line(pair: Pair, tmp_path: Path) -> None:
    added = ask("volume", "add", "projects", "--size", "1G", "--priority", "mail=5", "--atomic", "db=db/**", "--atomic", "db=wal")
    assert added.stdout == ""
    assert "served by nas1" in added.stderr
    (listed,) = data("volume", "list")
    assert (listed["primary"], listed["secondary"], listed["size_bytes"]) == ("nas1", "nas2", 1 << 30)
    assert listed["priorities"] == [["mail", 5]]
    assert listed["policy"]["atomic_sets"] == [{"name": "db", "patterns": ["db/**", "wal"]}]
    ready = data("replicate", "projects", "--prepare")
    assert ready["built"]["pieces"] == 3
    assert "had been prepared before" in ask("replicate", "projects", "--prepare").stderr
    ask("replicate", "projects", "--prepare", "--rate", "50M", error=SystemExit)
    sent = data("replicate", "projects", "--rate", "50M")
    assert sent["sent"]["pieces_sent"] == 3
    assert sent["transfer"] == ready["transfer"]

    pair.fails = [die()]
    ask("replicate", "projects", error=NodeUnreachable)
    (standing,) = data("status")
    assert standing["open_transfers"][0]["gauge"]["files_whole"] == 2
    assert standing["primary"]["facts"] is None
    in_a_pipe = ask("status").stdout
    assert "\x1b" not in in_a_pipe
    assert "2 of 4 changed files" in in_a_pipe

    assert data("salvage", "projects", "--dry-run")["generation"] is None
    page = tmp_path / "statement.html"
    stored = data("salvage", "projects", "--yes", "--html", str(page))
    assert stored["files"]["recovered"] == 2
    assert page.read_text().startswith("<!doctype html>")
    assert data("statement", "projects") == stored
    lines = ask("statement", "projects").stdout.splitlines()
    assert "recovered\t10\twhole\tall its update and differential data arrived" in lines
    assert data("salvage", "projects", "--undo", "--yes") == {"undone": "projects"}
    pair.nas1.dead = False
    assert data("replicate", "projects")["resumed"]
    assert not data("unserve", "projects")["serving"]
    assert data("serve", "projects")["serving"]


def test_a_failover_from_the_command_line(pair: Pair) -> None:
    pair.fence, pair.fence_options = "manual", FenceOptions()
    ask("volume", "add", "projects", "--size", "1G")
    data("replicate", "projects")
    ask("failover", "projects", "--yes", error=PrimaryAlive)
    pair.fails = [die()]
    ask("replicate", "projects", error=NodeUnreachable)
    steps = data("failover", "projects", "--dry-run")["steps"]
    assert [found["step"] for found in steps] == ["fence", "salvage", "promote", "address", "serve", "record"]
    assert "fence nas1 (by manual)" in ask("failover", "projects", "--dry-run").stdout
    ask("failover", "projects", error=SystemExit)
    ask("failover", "projects", "--planned", "--force", "--yes", error=SystemExit)
    done = data("failover", "projects", "--yes", "--confirm-fenced", "nas1")
    assert (done["target"], done["files_recovered"], done["kind"]) == ("nas2", 2, "unplanned")
    assert done["rto_s"] > 0
    assert "nas2 took projects over from nas1 (fenced by manual)" in ask("history", "projects").stdout


def test_what_is_not_given_to_set_stays(pair: Pair) -> None:
    ask("volume", "add", "projects", "--size", "64M", "--deletions", "apply", "--priority", "a=1")
    assert data("volume", "set", "projects", "--priority", "b=2")["priorities"] == [["b", 2], ["a", 1]]
    entry = data("volume", "set", "projects", "--no-priorities", "--atomic", "s=x")
    assert entry["priorities"] == []
    assert entry["policy"] == {"deletions": "apply", "atomic_sets": [{"name": "s", "patterns": ["x"]}]}
    assert data("volume", "set", "projects", "--no-atomic")["policy"]["atomic_sets"] == []


@pytest.mark.parametrize("words", [("salvage", "projects", "--declare-dead"), ("salvage", "projects", "--undo"), ("discard", "projects")])
def test_what_destroys_wants_yes_where_nobody_can_be_asked(pair: Pair, words: tuple[str, ...]) -> None:
    ask("volume", "add", "projects", "--size", "64M")
    pair.fails = [lose(LinkLost)] * 9
    ask("replicate", "projects", error=LinkLost)
    before = (list(pair.generations["nas2"]), dict(pair.transfers["nas2"]))
    result = CliRunner().invoke(landfall, words)
    assert result.exit_code == 2
    assert "add --yes" in result.stderr
    assert (pair.generations["nas2"], pair.transfers["nas2"]) == before
    ask("salvage", "projects", "--yes", error=PrimaryAlive)
    assert [gone["node"] for gone in data("discard", "projects", "--yes")] == ["nas2", "nas1"]


@pytest.mark.parametrize(
    "words",
    [
        ("volume", "add", "p", "--size", "1Q"),
        ("volume", "add", "p", "--size", "٣M"),
        ("volume", "add", "p", "--size", "99999999T"),
        ("volume", "add", "p", "--size", "1G", "--priority", "mail=99999999999999999999"),
        ("volume", "add", "p", "--size", "1G", "--primary", "nas1", "--secondary", "nas1"),
        ("salvage", "p", "--yes", "--html", "/nowhere/at/all.html"),
        ("volume", "add", "p", "--size", "1G", "--priority", "mail"),
        ("volume", "add", "p", "--size", "1G", "--atomic", "=x"),
        ("replicate", "p", "--streams", "0"),
        ("explain", "no-such-code"),
        ("salvage", "p", "--transfer", "x"),
    ],
)
def test_a_wrong_command_line_ends_with_two(pair: Pair, words: tuple[str, ...]) -> None:
    assert CliRunner().invoke(landfall, words).exit_code == 2
    assert pair.nas1.asked == []


def every_command(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))
        else:
            yield (*path, name), command


def test_every_verb_has_json_and_says_what_it_does() -> None:
    for path, command in every_command(landfall):
        assert "--json" in [option for parameter in command.params for option in parameter.opts], path
        assert command.help, path


def test_codes_and_exit_codes_are_unique_and_documented() -> None:
    def below(kind: type[LandfallError]) -> list[type[LandfallError]]:
        return [kind, *(found for child in kind.__subclasses__() for found in below(child))]

    classes = [kind for kind in below(LandfallError) if kind.__module__.startswith(("agent.", "mgmt."))]
    assert [code for code, times in Counter(kind.code for kind in classes).items() if times > 1] == []
    assert [code for code, times in Counter(kind.exit_code for kind in classes).items() if times > 1] == []
    for kind in classes:
        assert kind.exit_code not in {0, 1, 2, 130}
        text = explain_code(kind.code)
        assert text
        assert (kind.__doc__ or "") in text
        assert kind.fix in text
        assert kind.code in ask("explain").stdout
        assert data("explain", kind.code)["exit_code"] == kind.exit_code
    assert set(by_code()) == {kind.code for kind in classes}


def program(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mgmt.cli", *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


def test_an_error_is_printed_once_without_a_traceback_and_its_class_gives_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("colour = 3\n")
    done = program("--config", str(tmp_path / "c.toml"), "status", "--json")
    assert done.returncode == 20
    assert done.stderr.count("unknown key colour") == 1
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["code"] == "config-invalid"
    assert program("check-config", LANDFALL_CONFIG=str(tmp_path / "none.toml")).returncode == 20


def test_what_the_system_refuses_is_said_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where a folder is wanted")
    (tmp_path / "c.toml").write_text('state_dir = "state"\n')
    done = program("--config", str(tmp_path / "c.toml"), "volume", "list", "--json")
    assert done.returncode == 55
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["code"] == "path-refused"


@pytest.mark.parametrize(
    "words", [("mgmt.cli", "explain"), ("agent.cli", "dmi", "show", str(GOLDEN_DMI))], ids=["landfall", "landfall-agent"]
)
def test_a_disk_that_is_full_under_the_output_is_said(words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", *words], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 55
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words", [("--lab", "{}", "lab", "status"), ("lab", "status", "--dir", "{}"), ("--lab", "/a", "lab", "status", "--dir", "{}")]
)
def test_the_lab_s_own_commands_mean_the_lab_that_is_named(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = program(*(word.format(tmp_path) for word in words), LANDFALL_LAB="/another")
    assert done.stdout == f"{tmp_path}: no lab\n"


def test_where_there_is_no_volume_status_says_so(pair: Pair) -> None:
    assert "landfall volume add" in ask("status").stderr
    ask("volume", "add", "projects", "--size", "64M")
    assert "never replicated" in ask("status").stdout
    ask("replicate", "projects")
    assert "nothing is open.\n" in ask("status").stdout
    ask("unserve", "projects")
    assert "no node serves it" in ask("status").stdout


def test_what_only_a_silent_secondary_knows_is_not_guessed(pair: Pair) -> None:
    ask("volume", "add", "projects", "--size", "64M")
    pair.fails = [lose(LinkLost)] * 9
    ask("replicate", "projects", error=LinkLost)
    assert data("status")[0]["open_transfers"][0]["gauge"]["files_whole"] == 2
    pair.nas2.dead = True
    assert data("status")[0]["open_transfers"][0]["gauge"] is None
    assert "not known" in ask("status").stdout


def test_J10_a_hostile_name_is_shown_escaped(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(f'state_dir = "{tmp_path}/state"\n')
    done = program("--config", str(tmp_path / "c.toml"), "status", "x\x1b[2J")
    assert done.returncode == 30
    assert "\x1b" not in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m mgmt.cli explain | head -1"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""


def test_K7_ctrl_c_ends_with_130(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        key = new_key(tmp_path / "key")
        (tmp_path / "c.toml").write_text(
            f'state_dir = "state"\n[[node]]\nname = "nas1"\naddress = "127.0.0.1"\nssh_port = {silent.getsockname()[1]}\n'
            f'ssh_key = "key"\nhost_key = "{line_of(key)}"\n[[node]]\nname = "nas2"\naddress = "127.0.0.1"\nssh_key = "key"\n'
            f'host_key = "{line_of(key)}"\n'
        )
        started = subprocess.Popen(
            [sys.executable, "-m", "mgmt.cli", "--config", str(tmp_path / "c.toml"), "volume", "add", "p", "--size", "1G"],
            stderr=subprocess.PIPE,
            text=True,
        )
        silent.settimeout(30)
        connection, _ = silent.accept()
        started.send_signal(signal.SIGINT)
        _, talk = started.communicate(timeout=30)
        connection.close()
    assert started.returncode == 130
    assert talk.strip() == "landfall: interrupted"
