"""The playbooks read as Ansible reads them, and what they write reads as the agent reads it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import jinja2
import yaml

from agent.config import Config, read_config

PLAYBOOKS = Path(__file__).resolve().parents[2] / "playbooks"
ROLE = PLAYBOOKS / "roles" / "agent"
ANSIBLE_PLAYBOOK = Path(sys.executable).parent / "ansible-playbook"
VALUES = {
    "agent_node": "nas1",
    "agent_replication_address": "192.0.2.11",
    "agent_state_dir": "/var/lib/landfall/state",
    "agent_pool_dir": "/var/lib/landfall/pool",
    "agent_mount_dir": "/srv/landfall",
}


def test_every_playbook_passes_ansibles_syntax_check(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.ini"
    hosts.write_text("[nas]\nnas1 agent_replication_address=192.0.2.11\n")
    for playbook in PLAYBOOKS.glob("*.yml"):
        done = subprocess.run(
            [ANSIBLE_PLAYBOOK, "--syntax-check", "--inventory", hosts, playbook],
            capture_output=True,
            text=True,
            env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_every_task_names_its_module_in_full() -> None:
    for path in [*ROLE.glob("tasks/*.yml"), *ROLE.glob("handlers/*.yml")]:
        for task in yaml.safe_load(path.read_text()):
            modules = set(task) - {"name", "loop", "loop_control", "register", "notify", "when", "become"}
            assert len(modules) == 1, task
            assert modules.pop().startswith("ansible.builtin."), task


def test_the_role_specifies_every_variable_it_uses() -> None:
    specified = set(yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]["options"])
    defaults = set(yaml.safe_load((ROLE / "defaults/main.yml").read_text()))
    registered = {"agent_release"}
    used = {name for path in ROLE.rglob("*.*") for name in re.findall(r"\bagent_\w+", path.read_text())}
    assert used - registered == specified
    assert defaults <= specified


def test_the_configuration_it_writes_is_one_the_agent_takes(tmp_path: Path) -> None:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    environment.filters["to_json"] = json.dumps
    text = environment.from_string((ROLE / "templates/agent.toml.j2").read_text()).render(VALUES)
    path = tmp_path / "agent.toml"
    path.write_text(text)
    assert read_config(path).node == "nas1"
    assert set(tomllib.loads(text)) <= {field.name for field in fields(Config)}
