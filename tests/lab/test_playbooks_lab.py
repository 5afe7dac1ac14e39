"""The playbooks on the local lab's nodes, and what they do with a disk, a name or a death that nobody wished for."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import yaml

from agent.config import read_config
from agent.contract.messages import Hello
from mgmt.inventory import NodeEntry, read_inventory
from mgmt.lab import ansible, control, lifecycle
from mgmt.lab.layout import NAS_NODES, Lab, NodeName
from mgmt.lab.namespace import within
from mgmt.reach import ssh_node

PLAYBOOKS = Path(__file__).resolve().parents[2] / "playbooks"
ANSIBLE_PLAYBOOK = Path(sys.executable).parent / "ansible-playbook"
LIMIT_S = 240
# Finding out which Python a machine has takes longer than all the rest.
HERE = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
EVIL = "{{ lookup('ansible.builtin.pipe', 'touch PWNED') }}"

pytestmark = [pytest.mark.root, pytest.mark.slow]


@dataclass(frozen=True, slots=True)
class Played:
    """What ansible-playbook printed, and of each host how many tasks changed something."""

    status: int
    text: str
    changed: dict[str, int]


def environment(home: Path) -> dict[str, str]:
    own = {"HOME": str(home), "ANSIBLE_HOME": str(home / "ansible"), "ANSIBLE_ROLES_PATH": str(PLAYBOOKS / "roles")}
    return {**os.environ, **own, "ANSIBLE_NOCOLOR": "1", "LC_ALL": "C.UTF-8"}


def play(playbook: Path, inventory: Path, home: Path, *arguments: str) -> Played:
    done = subprocess.run(
        [ANSIBLE_PLAYBOOK, "--inventory", inventory, *arguments, playbook],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=environment(home),
        cwd=home,
        check=False,
    )
    recap = re.findall(r"^(\w+)\s+: ok=\d+\s+changed=(\d+)\s+unreachable=\d+\s+failed=(\d+)", done.stdout, re.MULTILINE)
    return Played(done.returncode, done.stdout + done.stderr, {host: int(changed) for host, changed, _ in recap})


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="landfall-plays-") as folder:
        made = Lab.at(Path(folder) / "lab")
        lifecycle.up(made, pool_size_bytes=512 << 20)
        try:
            yield made
        finally:
            lifecycle.down(made)


@pytest.fixture
def inventory(lab: Lab, tmp_path: Path) -> Path:
    path = tmp_path / "inventory.json"
    path.write_text(ansible.inventory(lab))
    return path


def files_of(lab: Lab) -> dict[Path, bytes]:
    etc = [lab.node(node) / "etc" for node in NAS_NODES]
    paths = [folder / name for folder in etc for name in ("agent.toml", "authorized_keys")]
    paths += [lab.node(NodeName.MGMT) / "etc" / name for name in ("landfall.toml", "known_hosts")]
    return {path: path.read_bytes() for path in paths}


def test_C10_a_play_that_is_killed_leaves_whole_files_and_one_more_makes_all_of_it(lab: Lab, inventory: Path, tmp_path: Path) -> None:
    agents = {node: read_config(lab.node(node) / "etc" / "agent.toml") for node in NAS_NODES}
    managed = read_inventory(lab.node(NodeName.MGMT) / "etc" / "landfall.toml")
    before = files_of(lab)

    kill_at("agent : Write the agent's configuration", inventory, tmp_path)
    killed = files_of(lab)

    first = play(PLAYBOOKS / "provision.yml", inventory, tmp_path, "--tags", "configuration")
    assert first.status == 0, first.text
    after = files_of(lab)
    assert all(content in {before[path], after[path]} for path, content in killed.items())

    second = play(PLAYBOOKS / "provision.yml", inventory, tmp_path, "--tags", "configuration", "--check", "--diff")
    assert second.changed == {"mgmt": 0, "nas1": 0, "nas2": 0}, second.text

    # The values are those that the lab was made with, and the nodes work with them.
    assert {node: read_config(lab.node(node) / "etc" / "agent.toml") for node in NAS_NODES} == agents
    assert read_inventory(lab.node(NodeName.MGMT) / "etc" / "landfall.toml") == managed
    for node in NAS_NODES:
        control.stop_service(lab, node, "agent")
        control.start_service(lab, node, "agent")
        assert within(lab.namespace(NodeName.MGMT), partial(greet, managed.entry(node))) == node


def test_the_preflight_list_is_what_a_play_goes_by(lab: Lab, inventory: Path, tmp_path: Path) -> None:
    program = tmp_path / "landfall"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m mgmt.cli --lab {lab.directory} "$@"\n')
    program.chmod(0o755)
    words = ("--tags", "preflight", "--extra-vars", json.dumps({"landfall_program": str(program)}))
    for node in NAS_NODES:
        if all(found.pid is None for found in control.services(lab, node) if found.name == "agent"):
            control.start_service(lab, node, "agent")
    done = play(PLAYBOOKS / "verify.yml", inventory, tmp_path, *words)
    assert (done.status, done.changed) == (0, {"mgmt": 0}), done.text
    control.stop_service(lab, NodeName.NAS2, "agent")
    done = play(PLAYBOOKS / "verify.yml", inventory, tmp_path, *words)
    assert done.status != 0
    assert "nas2, agent: " in done.text, "it says what has failed"
    control.start_service(lab, NodeName.NAS2, "agent")


SYSTEMCTL = """#!/bin/sh
# What the module `systemd_service` asks and tells of one unit at a time; a file for each that was begun.
echo "$@" >>{folder}/told
case $1 in
show) echo LoadState=loaded; [ -e "{folder}/$2" ] && echo ActiveState=active || echo ActiveState=inactive ;;
is-enabled) [ -e "{folder}/$2" ] && echo enabled || {{ echo disabled; exit 1; }} ;;
start | enable) touch "{folder}/$2" ;;
esac
"""


def test_the_units_of_rehearsals_are_installed_and_their_timers_kept_and_a_second_run_changes_nothing(tmp_path: Path) -> None:
    state, units = tmp_path / "state", tmp_path / "units"
    for folder in (state, units, tmp_path / "bin"):
        folder.mkdir()
    systemctl = tmp_path / "bin" / "systemctl"
    systemctl.write_text(SYSTEMCTL.format(folder=state))
    systemctl.chmod(0o755)
    hosts = tmp_path / "hosts.yml"
    hosts.write_text(yaml.safe_dump({"all": {"hosts": {"m": HERE}}}))
    given = {
        "mgmt_unit_dir": str(units),
        "mgmt_units": str(PLAYBOOKS.parent / "packaging" / "systemd"),
        "mgmt_rehearsals": ["media"],
        "mgmt_settings": {"state_dir": "/srv/state"},
        "mgmt_nodes": [],
    }
    task = {"ansible.builtin.include_role": {"name": "mgmt", "tasks_from": "rehearsals"}, "vars": given}
    of_host = {"PATH": f"{tmp_path / 'bin'}:{{{{ lookup('ansible.builtin.env', 'PATH') }}}}"}
    playbook = tmp_path / "play.yml"
    playbook.write_text(yaml.safe_dump([{"hosts": "all", "gather_facts": False, "environment": of_host, "tasks": [task]}]))
    before = play(playbook, hosts, tmp_path, "--check")
    assert before.status == 0, before.text
    assert list(units.iterdir()) == []
    first, second = play(playbook, hosts, tmp_path), play(playbook, hosts, tmp_path)
    assert (first.status, second.status) == (0, 0), first.text + second.text
    assert first.changed["m"] > 0
    assert second.changed["m"] == 0, second.text
    assert {path.name for path in state.iterdir()} == {"told", "landfall-rehearsal@media.timer"}
    assert "ReadWritePaths=/srv/state" in (units / "landfall-rehearsal@.service.d" / "state.conf").read_text()
    assert "OnCalendar=" in (units / "landfall-rehearsal@.timer").read_text()


def greet(entry: NodeEntry) -> str:
    with contextlib.closing(ssh_node(entry, connect_limit_s=30.0)) as agent:
        return agent.ask(Hello()).node


def kill_at(task: str, inventory: Path, home: Path) -> None:
    """Kill a run, its workers and their modules, when it says that it begins a task."""
    words = [ANSIBLE_PLAYBOOK, "--inventory", inventory, "--tags", "configuration", PLAYBOOKS / "provision.yml"]
    argv = [str(word) for word in words]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(home), cwd=home, start_new_session=True
    ) as running:
        assert running.stdout is not None
        seen = False
        try:
            for line in running.stdout:
                if seen := f"TASK [{task}" in line:
                    break
        finally:
            os.killpg(running.pid, signal.SIGKILL)
    assert seen


def test_J12_a_volumes_name_that_looks_like_a_template_stays_text(tmp_path: Path) -> None:
    program = tmp_path / "landfall"
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(tmp_path / 'said')!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        f"print(json.dumps([{{'name': {EVIL!r}}}]) if sys.argv[1] == 'volume' else '{{}}')\n"
    )
    program.chmod(0o755)
    hosts = tmp_path / "hosts.yml"
    hosts.write_text(yaml.safe_dump({"mgmt": {"hosts": {"m": {**HERE, "ansible_become": False}}}}))
    variables = tmp_path / "variables.json"
    wanted = ["landfall", "replicate", "--json", "--", EVIL]
    # From the catalog, and from whoever starts the play with a name that a user gave.
    for given in ({}, {"landfall_volumes": [{"__ansible_unsafe": EVIL}]}):
        (tmp_path / "said").unlink(missing_ok=True)
        variables.write_text(json.dumps({"landfall_program": str(program), **given}))
        done = play(PLAYBOOKS / "replicate.yml", hosts, tmp_path, "--extra-vars", f"@{variables}")
        assert done.status == 0, done.text
        said = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
        assert said[-1] == wanted[1:]
    assert not list(tmp_path.rglob("PWNED"))


@dataclass(frozen=True, slots=True)
class Disk:
    """A machine's storage as LVM and lsblk report it, and what must become of it: words of a refusal, or none."""

    name: str
    volume_groups: tuple[tuple[str, str, str], ...] = ()  # disk, group, tags
    filesystem: str | None = None
    serial: str = "landfall-test"
    refusal: str = ""
    made: bool = False


DISKS = (
    Disk("blank", made=True),
    Disk("labelled", volume_groups=(("/dev/vdb", "", ""),), filesystem="LVM2_member", made=True),
    Disk("ours", volume_groups=(("/dev/vdb", "landfall", "landfall,landfall-lab"),), filesystem="LVM2_member"),
    Disk(
        "unmarked",
        volume_groups=(("/dev/vdb", "landfall", "landfall"),),
        filesystem="LVM2_member",
        refusal="Volume group landfall on unmarked exists and does not carry the tag landfall-lab; nothing was touched.",
    ),
    Disk(
        "foreign",
        volume_groups=(("/dev/vdb", "data", ""),),
        filesystem="LVM2_member",
        refusal="Disk /dev/vdb of foreign belongs to volume group data; nothing was touched.",
    ),
    Disk("filled", filesystem="ext4", refusal="Disk /dev/vdb of filled is not empty; nothing was touched."),
    Disk(
        "elsewhere",
        volume_groups=(("/dev/vdc", "landfall", "landfall,landfall-lab"),),
        refusal="Volume group landfall on elsewhere lies on /dev/vdc and not on /dev/vdb alone; nothing was touched.",
    ),
    Disk("absent", serial="another", refusal="0 disks of absent have the serial number landfall-test; nothing was touched."),
)


def test_a_disk_with_anything_on_it_and_a_volume_group_without_the_marker_are_refused(tmp_path: Path) -> None:
    """All machines in one play: each has programs of its own that report its storage and write down what they are told to make."""
    for disk in DISKS:
        machine(tmp_path / disk.name, disk)
    hosts = {disk.name: {"fakes": str(tmp_path / disk.name)} for disk in DISKS}
    inventory = tmp_path / "hosts.yml"
    inventory.write_text(yaml.safe_dump({"all": {"hosts": hosts, "vars": HERE}}))
    playbook = tmp_path / "play.yml"
    task = {
        "ansible.builtin.include_role": {"name": "storage"},
        "vars": {
            "storage_substrate": "lvm-thin",
            "storage_disk_serial": "landfall-test",
            "storage_lab": True,
            "storage_modules_file": "{{ fakes }}/modules",
        },
    }
    of_host = {"PATH": "{{ fakes }}:{{ lookup('ansible.builtin.env', 'PATH') }}"}
    playbook.write_text(yaml.safe_dump([{"hosts": "all", "gather_facts": False, "environment": of_host, "tasks": [task]}]))
    done = play(playbook, inventory, tmp_path, "--forks", "2")
    for disk in DISKS:
        made = tmp_path / disk.name / "made"
        failure = re.search(rf'fatal: \[{disk.name}\]: FAILED! => .*?"msg": "(.*?)"', done.text, re.DOTALL)
        assert (failure.group(1) if failure else "").startswith(disk.refusal), (disk.name, done.text)
        assert bool(failure) == bool(disk.refusal), (disk.name, done.text)
        assert made.exists() == disk.made, (disk.name, done.text)
        assert (tmp_path / disk.name / "modules").exists() == (not disk.refusal), "of a machine that is refused nothing is touched"
        assert (tmp_path / disk.name / "loaded").exists() == (not disk.refusal)
        if disk.made:
            assert made.read_text() == "--addtag landfall-lab --addtag landfall landfall /dev/vdb\n"


def machine(folder: Path, disk: Disk) -> None:
    folder.mkdir()
    seen = {"path": "/dev/vdb", "fstype": disk.filesystem, "uuid": None, "pttype": None, "mountpoint": None, "serial": disk.serial}
    groups = [dict(zip(("pv_name", "vg_name", "vg_tags"), row, strict=True)) for row in disk.volume_groups]
    programs = {
        "lsblk": f"echo '{json.dumps({'blockdevices': [seen]})}'",
        "pvs": f"echo '{json.dumps({'report': [{'pv': groups}]})}'",
        "vgcreate": f'echo "$@" >>{folder}/made',
        "modprobe": f'echo "$@" >>{folder}/loaded',
        "dpkg-query": 'shift 2; for name; do echo "$name installed"; done',
    }
    for name, words in programs.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{words}\n")
        path.chmod(0o755)
