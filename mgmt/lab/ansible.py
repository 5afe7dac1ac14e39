"""The lab's nodes as Ansible sees them, so that the playbooks which provision machines provision the lab's nodes too, as far as they apply.

A node of the lab shares the machine's files, programs and init system, so of provision.yml its tag `configuration` applies: the agents' and
the management node's configuration, keys, and who may come in with them. These files lie in the lab's directory, each where its node finds
it, so they are written from outside by Ansible's connection `local`. Every value is read from the file that is there: what a lab was made
with is told in one place only (enrolment), and playing a play over it keeps it.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

from agent.contract.errors import LabMissing
from mgmt.lab.enrolment import agent_program
from mgmt.lab.layout import NAS_NODES, Lab, NodeName

_OWN_VARIABLES: Final = {  # keys of agent.toml that the role `agent` has a variable for
    "node": "agent_node",
    "replication_address": "landfall_replication_address",
    "state_dir": "agent_state_dir",
    "pool_dir": "agent_pool_dir",
    "run_dir": "agent_run_dir",
    "mount_dir": "agent_mount_dir",
    "substrate": "landfall_substrate",
    "volume_group": "landfall_volume_group",
}
_OWN_NODE_KEYS: Final = ("name", "address", "ssh_key", "host_key")


def inventory(lab: Lab) -> str:
    """Return the lab as an Ansible inventory in JSON; LabMissing where there is none.

    What stands in the lab's files is marked as a value, which Ansible does not take for a template (`__ansible_unsafe`).
    """
    marker = lab.read_marker()
    if marker is None or not marker.complete:
        raise LabMissing(f"the lab in {lab.directory} is not up")
    management = _read(lab.node(NodeName.MGMT) / "etc" / "landfall.toml")
    entries = {entry["name"]: entry for entry in management.pop("node")}
    document = {
        "all": {
            "vars": {
                "ansible_connection": "local",
                "ansible_become": False,
                "ansible_python_interpreter": sys.executable,
                "agent_program": str(agent_program()),
                "ssh_trust_keys_dir": str(lab.node(NodeName.MGMT) / "etc" / "keys"),
                "landfall_keys_dir": "keys",  # relative, so that it reads the same inside the node and outside
                "mgmt_config": str(lab.node(NodeName.MGMT) / "etc" / "landfall.toml"),
                "mgmt_known_hosts": str(lab.node(NodeName.MGMT) / "etc" / "known_hosts"),
                "mgmt_proof": "",
            },
            "children": {
                "nas": {"hosts": {str(node): _nas(lab, node, entries[node]) for node in NAS_NODES}},
                "mgmt": {"hosts": {"mgmt": {"landfall_settings": _values(management)}}},
            },
        }
    }
    return json.dumps(document, indent=1)


def _nas(lab: Lab, node: NodeName, entry: dict[str, Any]) -> dict[str, Any]:
    etc = lab.node(node) / "etc"
    agent = _read(etc / "agent.toml")
    socket = agent.pop("socket")
    agent.setdefault("substrate", "reflink")
    return {
        **{_OWN_VARIABLES[key]: _values(value) for key, value in agent.items() if key in _OWN_VARIABLES},
        "landfall_agent_settings": _values({key: value for key, value in agent.items() if key not in _OWN_VARIABLES}),
        "landfall_node_settings": _values({key: value for key, value in entry.items() if key not in _OWN_NODE_KEYS}),
        "landfall_address": _values(entry["address"]),
        "agent_config": str(etc / "agent.toml"),
        "ssh_trust_host_key": str(etc / "ssh_host_ed25519_key"),
        "ssh_trust_authorized_keys": str(etc / "authorized_keys"),
        "ssh_trust_command": f"{agent_program()} connect --socket {socket}",
    }


def _read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _values(value: Any) -> Any:
    match value:
        case str():
            return {"__ansible_unsafe": value}
        case dict():
            return {key: _values(part) for key, part in value.items()}
        case list():
            return [_values(part) for part in value]
        case _:
            return value
