"""Keys, pinned host keys and the nodes' configuration files, made anew for each lab.

Paths in these files are as a node sees them: its own folder is /run/landfall/node.

`etc/agent.toml` of each NAS node::

    node = "nas1"                               # its name, as the management node calls it
    state_dir = "/run/landfall/node/pool/state" # DMIs, arrival records, outbox: on the pool, so that power loss takes them too
    pool_dir = "/run/landfall/node/pool"        # XFS or btrfs with reflink: the volumes' images
    run_dir = "/run/landfall"                   # sockets and other things that go with a boot
    socket = "/run/landfall/agent.sock"         # where the daemon listens for `landfall-agent connect`
    mount_dir = "/run/landfall/node/srv"        # where served volumes are mounted
    replication_address = "10.77.0.11"          # where the data plane listens
    lab = true                                  # allows what only a lab may do
    substrate = "lvm-thin"                      # these two on a volume group only: the volumes are then in the group,
    volume_group = "landfall-nas1"              # and nothing but the state on the pool

`etc/landfall.toml` of the management node, whose relative paths start from the file's own folder, so that it reads the same
inside the node (/run/landfall/node/etc/landfall.toml) and outside (LAB/mgmt/etc/landfall.toml)::

    state_dir = "../state"                      # catalog
    network_namespace = "landfall-mgmt"         # lab only: enter this before connecting, when not inside the node

    [[node]]
    name = "nas1"
    address = "10.77.0.11"
    ssh_port = 22
    ssh_user = "root"
    ssh_key = "keys/nas1"                       # OpenSSH private key; good for `landfall-agent connect` and nothing else
    host_key = "ssh-ed25519 AAAA..."            # the only one accepted
    fence = "lab"                               # pulls the node's plug; from outside the lab's nodes only
    fence_options = { directory = "../.." }     # the lab's own folder
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from agent.system.files import write_durably
from mgmt.lab.layout import NAS_NODES, NODE_ROOT, Lab, LabSubstrate, NodeName

SSH_PORT = 22
AGENT_SOCKET = Path("/run/landfall/agent.sock")
FOLDERS = ("etc", "state", "log", "pool", "srv")


@dataclass(frozen=True, slots=True)
class KeyPair:
    """An ed25519 key in OpenSSH's formats."""

    private: bytes
    public: str

    @staticmethod
    def generate() -> KeyPair:
        """Return a new key."""
        key = Ed25519PrivateKey.generate()
        return KeyPair(
            key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
            key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(),
        )


def agent_program() -> Path:
    """Return the console script `landfall-agent` of this very installation."""
    return Path(sys.executable).parent / "landfall-agent"


def enrol(lab: Lab, substrate: LabSubstrate = LabSubstrate.REFLINK) -> None:
    """Write the folders, keys and configuration of all nodes."""
    host_keys = {node: KeyPair.generate() for node in NodeName}
    for node in NodeName:
        for folder in FOLDERS:
            (lab.node(node) / folder).mkdir(parents=True, exist_ok=True)
        etc = lab.node(node) / "etc"
        write_durably(etc / "ssh_host_ed25519_key", host_keys[node].private)
        write_durably(etc / "sshd_config", _sshd_config(node).encode())
        write_durably(etc / "authorized_keys", b"")
        hosts = "".join(f"{other.address} {other}\n{other.address6} {other}\n" for other in NodeName)
        write_durably(etc / "hosts", f"127.0.0.1 localhost\n::1 localhost\n{hosts}".encode(), mode=0o644)
    keys = lab.node(NodeName.MGMT) / "etc" / "keys"
    keys.mkdir(mode=0o700, exist_ok=True)
    known_hosts = "".join(f"{node.address} {host_keys[node].public}\n" for node in NAS_NODES)
    write_durably(lab.node(NodeName.MGMT) / "etc" / "known_hosts", known_hosts.encode())
    for node in NAS_NODES:
        key = KeyPair.generate()
        write_durably(keys / node, key.private)
        write_durably(lab.node(node) / "etc" / "authorized_keys", _authorized(key).encode())
        write_durably(lab.node(node) / "etc" / "agent.toml", _agent_toml(lab, node, substrate).encode())
    inventory = _landfall_toml(lab, {node: host_keys[node].public for node in NAS_NODES})
    write_durably(lab.node(NodeName.MGMT) / "etc" / "landfall.toml", inventory.encode())


def _authorized(key: KeyPair) -> str:
    return f'restrict,command="{agent_program()} connect --socket {AGENT_SOCKET}" {key.public} management\n'


def _sshd_config(node: NodeName) -> str:
    # A bash that sshd starts reads ~/.bashrc of the machine's root, whatever that does and however long, unless SHLVL says that it is no
    # login's first shell (bash(1), INVOCATION).
    etc = NODE_ROOT / "etc"
    return f"""\
Port {SSH_PORT}
ListenAddress {node.address}
ListenAddress {node.address6}
HostKey {etc}/ssh_host_ed25519_key
AuthorizedKeysFile {etc}/authorized_keys
PermitRootLogin forced-commands-only
AllowUsers root
AuthenticationMethods publickey
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
PidFile none
PrintMotd no
SetEnv SHLVL=1
ClientAliveInterval 5
ClientAliveCountMax 3
"""


def _agent_toml(lab: Lab, node: NodeName, substrate: LabSubstrate) -> str:
    on_group = f'substrate = "{substrate}"\nvolume_group = "{lab.volume_group(node)}"\n'
    return f"""\
node = "{node}"
state_dir = "{NODE_ROOT}/pool/state"
pool_dir = "{NODE_ROOT}/pool"
run_dir = "{AGENT_SOCKET.parent}"
socket = "{AGENT_SOCKET}"
mount_dir = "{NODE_ROOT}/srv"
replication_address = "{node.address}"
lab = true
{on_group if substrate is not LabSubstrate.REFLINK else ""}"""


def _landfall_toml(lab: Lab, host_keys: dict[NodeName, str]) -> str:
    head = f'state_dir = "../state"\nnetwork_namespace = {json.dumps(lab.namespace(NodeName.MGMT))}\n'
    return head + "".join(
        f"""
[[node]]
name = "{node}"
address = "{node.address}"
ssh_port = {SSH_PORT}
ssh_user = "root"
ssh_key = "keys/{node}"
host_key = {json.dumps(host_keys[node])}
fence = "lab"
fence_options = {{ directory = "../.." }}
"""
        for node in NAS_NODES
    )
