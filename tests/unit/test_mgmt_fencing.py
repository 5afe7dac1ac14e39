"""Fences: whatever a program does, only code 0 with a proof of the right thing is a proof."""

from __future__ import annotations

import json
import os
import pty
import stat
import sys
from pathlib import Path
from uuid import UUID

import pytest

from mgmt.fencing.kinds import FenceKind
from mgmt.fencing.proof import Evidence, fence, judge, program_of
from mgmt.fencing.protocol import AgentOptions, FenceCode, FenceRequest
from mgmt.lab.enrolment import KeyPair

VOLUME = UUID("11111111-2222-3333-4444-555555555555")
REQUEST = FenceRequest("nas1", VOLUME, 3)
PROOF = {"node": "nas1", "volume": str(VOLUME), "epoch": 3, "proof": "the switch says that the outlet is off"}
LIMIT_S = 60.0


def program(folder: Path, body: str) -> tuple[str, ...]:
    """An operator's program."""
    path = folder / "fence"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return (str(path),)


def ran(folder: Path, body: str, limit_s: float = LIMIT_S) -> Evidence:
    return fence(FenceKind.COMMAND, program(folder, body), REQUEST, limit_s)


def own(kind: FenceKind, options: AgentOptions, *, limit_s: float = LIMIT_S) -> Evidence:
    return fence(kind, program_of(kind, ()), FenceRequest("nas1", VOLUME, 3, options), limit_s)


def test_I16_a_program_that_proves_it_is_believed_and_hears_what_it_is_asked(tmp_path: Path) -> None:
    evidence = ran(tmp_path, f"cat > {tmp_path}/asked; echo '{json.dumps(PROOF)}'")
    assert (evidence.proved, evidence.code, evidence.words) == (True, 0, PROOF["proof"])
    assert (evidence.node, evidence.volume, evidence.epoch, evidence.agent) == ("nas1", VOLUME, 3, "command")
    assert FenceRequest.from_line((tmp_path / "asked").read_bytes()) == REQUEST


@pytest.mark.parametrize("code", [1, 2, *(code for code in FenceCode if code), 9, 255])
def test_I16_every_other_exit_code_is_no_proof_whatever_is_said_with_it(tmp_path: Path, code: int) -> None:
    evidence = ran(tmp_path, f"echo '{json.dumps(PROOF)}'; exit {code}")
    assert (evidence.proved, evidence.code) == (False, code)
    assert evidence.words


@pytest.mark.parametrize(
    "said",
    [
        "",
        "fenced",
        "null",
        "[]",
        json.dumps({**PROOF, "proof": "  "}),
        json.dumps({**PROOF, "proof": True}),
        json.dumps({key: value for key, value in PROOF.items() if key != "proof"}),
        json.dumps({**PROOF, "node": "nas2"}),
        json.dumps({**PROOF, "volume": str(UUID(int=7))}),
        json.dumps({**PROOF, "epoch": 2}),
        json.dumps({**PROOF, "epoch": "3"}),
        json.dumps({**PROOF, "epoch": True}),
        json.dumps(PROOF) + "\n" + json.dumps(PROOF),
        "[" * 50_000,
        "\x00\xff" * 100,
        json.dumps({**PROOF, "more": "x" * 70_000}),
    ],
    ids=range(16),
)
def test_I16_code_0_without_the_line_that_proves_it_is_no_proof(said: str) -> None:
    code, proved, words = judge(REQUEST, 0, said.encode("utf-8", "surrogateescape"), b"")
    assert (code, proved) == (0, False)
    assert words


def test_I16_a_program_that_hangs_dies_or_cannot_be_run_is_no_proof(tmp_path: Path) -> None:
    assert ran(tmp_path, "exec sleep 600", limit_s=0.3).code == FenceCode.TOO_LATE
    killed = ran(tmp_path, f"echo '{json.dumps(PROOF)}'; kill -9 $$")
    assert (killed.proved, killed.code) == (False, -9)
    (tmp_path / "fence").chmod(stat.S_IRUSR)
    for argv in ((str(tmp_path / "fence"),), (str(tmp_path / "nowhere"),)):
        evidence = fence(FenceKind.COMMAND, argv, REQUEST, LIMIT_S)
        assert (evidence.proved, evidence.code) == (False, FenceCode.REFUSED)


def test_the_words_of_a_program_that_says_nothing_in_json_are_kept(tmp_path: Path) -> None:
    assert "no route to the switch" in ran(tmp_path, "echo no route to the switch >&2; exit 5").words
    assert "outlet 7 is unknown" in ran(tmp_path, """echo '{"words": "outlet 7 is unknown"}'; exit 7""").words


def test_I4_a_lease_is_refused_for_a_node_that_can_be_paused_and_for_one_that_never_had_one() -> None:
    assert own(FenceKind.LEASE, AgentOptions(lease_s=1, pausable=True)).code == FenceCode.REFUSED
    assert own(FenceKind.LEASE, AgentOptions()).code == FenceCode.REFUSED
    assert own(FenceKind.SSH_STOP, AgentOptions(pausable=True)).code == FenceCode.REFUSED


def test_a_lease_is_waited_out() -> None:
    evidence = own(FenceKind.LEASE, AgentOptions(lease_s=0.5))
    assert evidence.proved, evidence
    assert evidence.seconds > 1.5


def test_an_ssh_stop_of_a_node_that_does_not_answer_proves_nothing(tmp_path: Path) -> None:
    pair = KeyPair.generate()
    options = AgentOptions(address="::1", ssh_port=1, ssh_key=str(tmp_path / "key"), host_key=pair.public)
    (tmp_path / "key").write_bytes(pair.private)
    assert own(FenceKind.SSH_STOP, options).code == FenceCode.UNTOLD


def test_a_lab_that_is_not_there_proves_nothing(tmp_path: Path) -> None:
    assert own(FenceKind.LAB, AgentOptions()).code == FenceCode.REFUSED
    assert own(FenceKind.LAB, AgentOptions(directory=str(tmp_path / "lab"))).code == FenceCode.UNTOLD
    assert not (tmp_path / "lab").exists()


VIRSH = """#!/bin/sh
[ "$1" = --connect ] && shift 2
case $1 in
  destroy) exit 1 ;;
  domstate) case $2 in
    off) echo "shut off" ;;
    on) echo running ;;
    unknown) echo "error: failed to get domain 'unknown'" >&2; exit 1 ;;
    *) echo "error: failed to connect to the hypervisor" >&2; exit 1 ;;
  esac ;;
esac
"""


@pytest.mark.parametrize(
    ("domain", "code"),
    [("off", FenceCode.FENCED), ("on", FenceCode.ALIVE), ("unknown", FenceCode.REFUSED), ("x", FenceCode.DEVICE_SILENT), ("-x", 7)],
)
def test_what_the_hypervisor_says_of_a_domain_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, domain: str, code: int) -> None:
    (tmp_path / "virsh").write_text(VIRSH)
    (tmp_path / "virsh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    evidence = own(FenceKind.LIBVIRT, AgentOptions(domain=domain, uri="test:///default"))
    assert (evidence.code, evidence.proved) == (code, code == FenceCode.FENCED)


def test_a_person_types_the_nodes_name_or_said_it_before(tmp_path: Path) -> None:
    assert own(FenceKind.MANUAL, AgentOptions(confirmed="nas1")).proved
    assert own(FenceKind.MANUAL, AgentOptions(confirmed="nas2")).code == FenceCode.UNTOLD
    for typed, proved in ((b"nas1\n", True), (b"yes\n", False)):
        child, terminal = pty.fork()
        if child == 0:
            evidence = own(FenceKind.MANUAL, AgentOptions())
            os._exit(0 if evidence.proved else 1)
        asked = b""
        while b"type its name: " not in asked:
            asked += os.read(terminal, 1024)
        os.write(terminal, typed)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if proved else 1)
        os.close(terminal)


def test_without_a_terminal_nobody_can_be_asked() -> None:
    argv = ("setsid", "--wait", sys.executable, "-m", "mgmt.fencing.manual")
    assert fence(FenceKind.MANUAL, argv, REQUEST, LIMIT_S).code == FenceCode.DEVICE_SILENT
