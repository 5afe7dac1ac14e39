"""The drill on virtual machines, without them: what it asks of a node, when it kills, and what it says of a play that fails."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

import pytest
import zstandard

from agent.contract.errors import CommandFailed, DrillFailed, NoSuchGeneration
from agent.contract.identity import GenerationId
from mgmt.drill.vm import counting
from mgmt.drill.vm import machines as real
from mgmt.drill.vm.counting import await_bytes
from mgmt.drill.vm.images import copy_generation, copy_served
from mgmt.drill.vm.plays import Playing, Task

GENERATION = GenerationId(UUID(int=7), 1, 2, "ab" * 16)
POOL = Path("/pool")
TAG = f"landfall/generation/1/{GENERATION.volume}/1/2/{GENERATION.nonce}/frozen/99"
PLAYBOOK = """
- name: A play
  hosts: all
  gather_facts: false
  tags: [one]
  tasks:
    - name: It says something
      ansible.builtin.debug:
        msg: "{{ word }}"
    - name: It ends here
      ansible.builtin.command: {argv: [sh, -c, "echo the disk is on fire >&2; exit 3"]}
      when: word == "fail"
- name: Another
  hosts: all
  tags: [two]
  tasks: [{name: Nobody comes here, ansible.builtin.fail: {}}]
"""


class Scripted:
    """Machines that answer from a script and note what was asked. Each look at the interface finds the next number."""

    def __init__(self, answers: dict[str, str] | None = None, counts: Sequence[int] = ()) -> None:
        self.answers, self.counts = answers or {}, list(counts)
        self.asked: list[str] = []
        self.fails = ""

    def run(self, node: str, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 0.0) -> str:
        self.asked.append(f"{node}: {' '.join(argv)}")
        return next((said for word, said in self.answers.items() if word in argv), "")

    def copy_out(self, node: str, argv: Sequence[str], to: Path) -> None:
        self.asked.append(f"{node}: {' '.join(argv)}")
        if self.fails:
            raise CommandFailed(self.fails)
        to.write_bytes(b"copied")

    def bytes_sent(self, node: str) -> int:
        return self.counts.pop(0)


class Transfer:
    """A play that ends by itself after a number of looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    @property
    def under_way(self) -> bool:
        self.looks -= 1
        return self.looks > 0

    def finish(self) -> None:
        pass

    def cancel(self) -> None:
        self.looks = 0


def report(*volumes: tuple[str, str, str]) -> str:
    rows = [
        {"vg_name": "landfall", "lv_name": name, "lv_uuid": name, "lv_tags": tags, "lv_active": active} for name, tags, active in volumes
    ]
    return json.dumps({"report": [{"lv": rows}]})


def test_it_comes_at_the_first_look_after_the_byte_and_bytes_from_before_do_not_count() -> None:
    machines, seen = Scripted(counts=[1000, 1400, 1510, 9999]), []
    assert await_bytes(machines, "nas1", 500, 1000, Transfer(99), lambda done, total: seen.append(done)) == 510
    assert seen == [0, 400, 510]


def test_a_transfer_that_ends_before_its_byte_is_said() -> None:
    with pytest.raises(DrillFailed, match="ended after 20 of 500 bytes"):
        await_bytes(Scripted(counts=[0, 10, 20, 30]), "nas1", 500, 0, Transfer(3), lambda done, total: None)


def test_a_transfer_of_which_nothing_comes_any_more_has_ended_though_nobody_is_there_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "STILL_LIMIT_S", 0.05)
    with pytest.raises(DrillFailed, match="ended after 20 of 500 bytes"):
        await_bytes(Scripted(counts=[0, 10, *[20] * 10**6]), "nas1", 500, 0, None, lambda done, total: None)


def test_a_generation_is_found_by_its_whole_identity_and_left_inactive(tmp_path: Path) -> None:
    other = TAG.replace(GENERATION.nonce, "cd" * 16)
    machines = Scripted({"lvs": report(("[hidden]", "", ""), ("one", f"x,{TAG}", ""), ("two", other, "active"))})
    machines.fails = "the link broke"
    with pytest.raises(CommandFailed, match="the link broke"):
        copy_generation(machines, "nas1", POOL, GENERATION, tmp_path / "image")
    words = [asked.removeprefix("nas1: ") for asked in machines.asked[2:]]
    assert words[0] == "lvchange --yes --activate y --ignoreactivationskip /dev/landfall/one"
    assert words[1].endswith("if=/dev/landfall/one")
    assert words[2] == "lvchange --yes --activate n /dev/landfall/one"


def test_what_was_active_stays_so_and_what_is_not_there_or_there_twice_is_refused(tmp_path: Path) -> None:
    machines = Scripted({"lvs": report(("one", TAG, "active"))})
    copy_generation(machines, "nas1", POOL, GENERATION, tmp_path / "image")
    assert not any("lvchange" in asked for asked in machines.asked)
    for volumes in ((), (("one", TAG, ""), ("two", TAG, ""))):
        with pytest.raises(NoSuchGeneration):
            copy_generation(Scripted({"lvs": report(*volumes)}), "nas1", POOL, GENERATION, tmp_path / "image")


def test_a_generation_in_a_file_is_read_as_a_file(tmp_path: Path) -> None:
    machines = Scripted({"sh": "there\n"})
    copy_generation(machines, "nas1", POOL, GENERATION, tmp_path / "image")
    assert machines.asked[-1].endswith(f"if=/pool/volumes/{GENERATION.volume}/generations/{GENERATION.name}.img")


def test_what_is_served_is_frozen_and_thawed_by_one_program(tmp_path: Path) -> None:
    machines = Scripted({"findmnt": "/dev/mapper/x\n"})
    copy_served(machines, "nas2", "/srv/v", tmp_path / "image")
    assert machines.asked[-1].startswith("nas2: bash -c trap")
    assert machines.asked[-1].endswith("/srv/v /dev/mapper/x")


def test_a_copy_has_holes_where_there_are_zeros(tmp_path: Path) -> None:
    content = os.urandom(5000) + bytes(8 << 20) + b"end" + bytes(3 << 20)
    (tmp_path / "packed").write_bytes(zstandard.compress(content))
    real._unpack(tmp_path / "packed", tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == content
    assert (tmp_path / "image").stat().st_blocks * 512 < 4 << 20


def play(tmp_path: Path, word: str) -> tuple[Playing, list[Task]]:
    (tmp_path / "play.yml").write_text(PLAYBOOK)
    (tmp_path / "hosts.ini").write_text(f"here ansible_connection=local ansible_python_interpreter={sys.executable}\n")
    heard: list[Task] = []
    variables = {"word": word}
    return Playing(
        tmp_path / "play.yml", tmp_path / "hosts.ini", tmp_path / "run", tags="one", variables=variables, hear=heard.append
    ), heard


def test_a_plays_tasks_are_heard_as_they_begin_and_its_artefacts_kept(tmp_path: Path) -> None:
    playing, heard = play(tmp_path, "hello")
    playing.finish(120)
    assert [task.name for task in heard] == ["It says something", "It ends here"]
    assert not playing.under_way
    assert "hello" in (tmp_path / "run" / "artifacts" / "one" / "stdout").read_text()


def test_a_play_that_fails_says_which_task_on_which_host_and_in_which_words(tmp_path: Path) -> None:
    playing, heard = play(tmp_path, "fail")
    with pytest.raises(CommandFailed) as caught:
        playing.finish(120)
    assert "here: It ends here: the disk is on fire" in str(caught.value)
    assert heard[-1] == Task("A play", "It ends here", "here", "the disk is on fire")
