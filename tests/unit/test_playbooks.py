"""The playbooks read as Ansible reads them, and what they write reads as the agent and the management node read it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from agent.config import Config, read_config
from mgmt.inventory import read_inventory

PLAYBOOKS = Path(__file__).resolve().parents[2] / "playbooks"
ROLES = sorted(path for path in (PLAYBOOKS / "roles").iterdir())
ANSIBLE_PLAYBOOK = Path(sys.executable).parent / "ansible-playbook"
AGENT = {
    "agent_node": "nas1",
    "agent_replication_address": "192.0.2.11",
    "agent_state_dir": "/var/lib/landfall/state",
    "agent_pool_dir": "/var/lib/landfall/pool",
    "agent_run_dir": "/run/landfall",
    "agent_mount_dir": "/srv/landfall",
    "agent_settings": {"smb_guest": True, "freeze_limit_s": 5.5},
}


def test_every_playbook_passes_ansibles_syntax_check(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.ini"
    hosts.write_text("[nas]\nnas1 landfall_replication_address=192.0.2.11\n[mgmt]\nmgmt\n")
    playbooks = sorted(PLAYBOOKS.glob("*.yml"))
    assert {path.stem for path in playbooks} >= {"provision", "replicate", "verify", "teardown"}
    done = subprocess.run(
        [ANSIBLE_PLAYBOOK, "--syntax-check", "--inventory", hosts, *playbooks],
        capture_output=True,
        text=True,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)
def test_every_role_specifies_every_variable_it_can_be_given(role: Path) -> None:
    entries = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]
    specified = {name for entry in entries.values() for name in entry["options"]}
    defaults = _keys(role / "defaults/main.yml")
    own = _keys(role / "vars/main.yml") | set(_registered(role))
    used = {name for path in role.rglob("*.*") for name in re.findall(rf"\b{role.name}_\w+", path.read_text())}
    assert used - own == specified - own
    assert defaults <= specified


@pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)
def test_every_default_is_specified_as_it_is(role: Path) -> None:
    entries = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]
    path = role / "defaults/main.yml"
    for name, value in (yaml.safe_load(path.read_text()) if path.exists() else {}).items():
        for options in (entry["options"] for entry in entries.values() if name in entry["options"]):
            assert options[name]["default"] == value, name


@pytest.mark.parametrize(("substrate", "group"), [("reflink", ""), ("lvm-thin", "landfall"), ("lvm-snapshot", "landfall")])
def test_the_configuration_it_writes_is_one_the_agent_takes(tmp_path: Path, substrate: str, group: str) -> None:
    text = _render("agent/templates/agent.toml.j2", **AGENT, agent_substrate=substrate, agent_volume_group=group)
    path = tmp_path / "agent.toml"
    path.write_text(text)
    config = read_config(path)
    assert (config.node, config.substrate, config.volume_group) == ("nas1", substrate, group)
    assert (config.smb_guest, config.freeze_limit_s) == (True, 5.5)
    assert set(tomllib.loads(text)) <= {field.name for field in fields(Config)}


def test_the_configuration_it_writes_is_one_the_management_node_takes(tmp_path: Path) -> None:
    key = tmp_path / "nas1"
    key.touch(mode=0o600)
    node = {
        "name": "nas1",
        "address": "192.0.2.11",
        "ssh_key": str(key),
        "host_key": "ssh-ed25519 AAAA",
        "settings": {"ssh_port": 2222, "fence": "libvirt", "fence_options": {"domain": 'a "b" {{ c }}', "limit_s": 5.0}},
    }
    path = tmp_path / "landfall.toml"
    path.write_text(_render("mgmt/templates/landfall.toml.j2", mgmt_nodes=[node], mgmt_settings={"streams": 3}))
    inventory = read_inventory(path)
    assert (inventory.streams, inventory.names) == (3, ("nas1",))
    assert (inventory.node[0].ssh_port, inventory.node[0].fence_options.domain) == (2222, 'a "b" {{ c }}')


def test_the_agents_unit_gives_no_mount_namespace_and_starts_only_what_is_proved() -> None:
    text = _render("agent/templates/landfall-agent.service", **AGENT, agent_substrate="reflink", agent_program="/p", agent_config="/c")
    settings = re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE)
    # Any of these puts the agent's mounts where nobody else sees them: systemd.exec(5), MountFlags.
    namespaced = (
        "ProtectSystem|ProtectHome|Private(Tmp|Devices|Mounts|Users)|ProtectKernel|ProtectControlGroups|ProtectProc|ProcSubset|.*Paths$"
    )
    assert not [name for name, _ in settings if re.match(namespaced, name)]
    assert ("ExecStartPre", "/p check-config --config /c") in settings
    assert ("KillMode", "process") in settings


def _render(template: str, **values: Any) -> str:
    """Return a role's template as Ansible renders it: its block tags take the line's end with them."""
    role, _, name = template.partition("/templates/")
    loader = jinja2.FileSystemLoader(PLAYBOOKS / "roles" / role / "templates")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True, loader=loader)
    environment.filters["to_json"] = json.dumps
    return environment.get_template(name).render(values)


def _keys(path: Path) -> set[str]:
    return set(yaml.safe_load(path.read_text())) if path.exists() else set()


def _registered(role: Path) -> list[str]:
    """Return the names that a role's own tasks make."""
    found = []
    for path in role.glob("tasks/*.yml"):
        text = path.read_text()
        found += re.findall(r"register: (\w+)", text)
        found += re.findall(rf"^\s+({role.name}_\w+):", text, re.MULTILINE)
    return found


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--python", "2.7"], "landfall: a node needs Python 3.11 or newer, not '2.7'.\n"),
        (["--machine", "x; id"], "landfall: 'x; id' is no machine's name; x86_64 and aarch64 are.\n"),
        (["--output"], "landfall: unknown argument --output; use --python VERSION or --machine NAME.\n"),
    ],
)
def test_the_wheelhouse_refuses_what_it_cannot_build_in_a_sentence(arguments: list[str], sentence: str) -> None:
    script = PLAYBOOKS.parent / "packaging" / "wheelhouse.sh"
    done = subprocess.run([script, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, sentence)
