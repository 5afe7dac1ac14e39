"""The management node's configuration: one TOML file. landfall.toml.sample has every key with its default."""

from __future__ import annotations

import stat
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import cattrs

from agent.contract.errors import ConfigInvalid, NameRefused
from agent.contract.identity import plain_name
from mgmt.fencing.kinds import FenceKind

DEFAULT_PATH: Final = Path("/etc/landfall/landfall.toml")
_NO_FILE: Final = "Name the configuration with --config (landfall.toml.sample has every key), or a local lab with --lab."


@dataclass(frozen=True, slots=True)
class FenceOptions:
    """What a node's fence needs; what is for another fence is not looked at."""

    program: tuple[str, ...] = ()  # command: the operator's program and its arguments
    domain: str = ""  # libvirt: the virtual machine, where it is not called as the node is
    uri: str = "qemu:///system"  # libvirt: the hypervisor
    directory: Path | None = None  # lab: its folder
    limit_s: float = 60.0  # in which it must answer, beyond what a lease or a person takes


@dataclass(frozen=True, slots=True)
class NodeEntry:
    """A NAS node and how it is reached."""

    name: str
    address: str
    ssh_key: Path  # private key, 0600; good for `landfall-agent connect` and nothing else
    host_key: str  # `ssh-ed25519 AAAA...`: the only one accepted
    ssh_port: int = 22
    ssh_user: str = "root"
    fence: str = ""  # how it is proved that it cannot write, one of mgmt.fencing's; empty: it cannot be proved
    fence_options: FenceOptions = field(default_factory=FenceOptions)
    pausable: bool = False  # a virtual machine: its clock may stand still while others take over


@dataclass(frozen=True, slots=True)
class Inventory:
    """Everything the management node is told. Relative paths start from the file's own folder."""

    state_dir: Path = Path("/var/lib/landfall/mgmt")  # catalog, private CA, fetched DMIs
    node: tuple[NodeEntry, ...] = ()
    network_namespace: str = ""  # lab only: entered before connecting
    connect_limit_s: float = 10.0  # to reach a node over SSH
    answer_limit_s: float = 600.0  # between two words of an agent at work
    silence_limit_s: float = 10.0  # after which NAS 1 and NAS 2 take each other for gone
    streams: int = 2  # TCP streams of a transfer
    rate_limit_bytes_s: int = 0  # of a transfer; 0: none
    keep_generations: int = 16  # of each volume, on each node
    resume_attempts: int = 5  # of one `landfall replicate`, while both nodes live
    cycle_s: float = 5.0  # of `landfall watch`
    automatic_failover: bool = False  # by `landfall watch`, without an operator
    lease_s: float = 60.0  # of a primary that is fenced by its lease; renewed in every cycle
    metrics_address: str = "127.0.0.1"  # where `landfall watch` answers Prometheus
    metrics_port: int = 0  # 0: nowhere
    probe_limit_s: float = 3.0  # in which a living node takes a connection

    def entry(self, name: str) -> NodeEntry:
        """Return a node by name."""
        for found in self.node:
            if found.name == name:
                return found
        raise ConfigInvalid(
            f"there is no node {name!r} in the configuration", fix="Enrol it, or name one of: " + ", ".join(self.names) + "."
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all nodes."""
        return tuple(found.name for found in self.node)


def read_inventory(path: Path) -> Inventory:
    """Return the configuration in ``path``; ConfigInvalid names every key that is unknown, missing or of the wrong type."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigInvalid(f"{path} cannot be read", cause=error.strerror or str(error), fix=_NO_FILE) from error
    except ValueError as error:
        fix = "Correct the line; `check-config` proves it."
        raise ConfigInvalid(f"{path} cannot be read as TOML", cause=str(error), fix=fix) from error
    try:
        inventory = _converter(path.parent.resolve()).structure(document, Inventory)
    except cattrs.BaseValidationError as error:
        words = cattrs.transform_error(error, format_exception=_in_words)
        raise ConfigInvalid(f"{path}: " + "; ".join(words)) from error
    _check(path, inventory)
    return inventory


def _check(path: Path, inventory: Inventory) -> None:
    if len(set(inventory.names)) != len(inventory.names):
        raise ConfigInvalid(f"{path}: two nodes have the same name")
    for number, node in enumerate(inventory.node):
        where = f"{path}: node[{number}]"
        try:
            plain_name(node.name)
        except NameRefused as error:
            raise ConfigInvalid(f"{where}.name: {error.message}") from error
        if not 0 < node.ssh_port < 65536:
            raise ConfigInvalid(f"{where}.ssh_port is no port")
        if len(node.host_key.split()) < 2:
            raise ConfigInvalid(f"{where}.host_key must read `ssh-ed25519 AAAA...`")
        try:
            mode = stat.S_IMODE(node.ssh_key.stat().st_mode)
        except OSError as error:
            raise ConfigInvalid(f"{where}.ssh_key cannot be read", cause=str(error)) from error
        if mode & 0o077:
            raise ConfigInvalid(f"{where}.ssh_key can be read by others (mode {mode:04o})", fix=f"chmod 600 {node.ssh_key}")
        _check_fence(where, node)
    if inventory.keep_generations < 2:
        raise ConfigInvalid(f"{path}: keep_generations must be at least 2: a base and a target")
    limits = ("connect_limit_s", "answer_limit_s", "silence_limit_s", "streams", "resume_attempts", "cycle_s", "probe_limit_s", "lease_s")
    for key in limits:
        if getattr(inventory, key) <= 0:
            raise ConfigInvalid(f"{path}: {key} must be above 0")
    if not 0 <= inventory.metrics_port < 65536:
        raise ConfigInvalid(f"{path}: metrics_port is no port")
    if inventory.rate_limit_bytes_s < 0:
        raise ConfigInvalid(f"{path}: rate_limit_bytes_s must not be below 0")


def _check_fence(where: str, node: NodeEntry) -> None:
    known = ", ".join(kind.value for kind in FenceKind)
    if node.fence and node.fence not in set(FenceKind):
        raise ConfigInvalid(f"{where}.fence is {node.fence!r}, it must be one of {known}")
    if node.fence == FenceKind.COMMAND and not node.fence_options.program:
        raise ConfigInvalid(f"{where}.fence_options.program must name the program that fences")
    if node.fence == FenceKind.LAB and node.fence_options.directory is None:
        raise ConfigInvalid(f"{where}.fence_options.directory must say where the lab is")
    if node.pausable and node.fence in {FenceKind.LEASE, FenceKind.SSH_STOP}:
        raise ConfigInvalid(
            f"{where}.fence is {node.fence}, which proves nothing of a node that can be paused",
            cause="its clock stands still with it, and when it wakes, its kernel writes before its agent looks",
            fix="Use libvirt or command.",
        )
    if node.fence_options.limit_s <= 0:
        raise ConfigInvalid(f"{where}.fence_options.limit_s must be above 0")


def _converter(folder: Path) -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    for kind, allowed in ((bool, (bool,)), (int, (int,)), (str, (str,)), (float, (int, float))):
        converter.register_structure_hook(kind, exactly(allowed))
    converter.register_structure_hook(Path, lambda value, _: folder / exactly((str,))(value, str))
    return converter


def exactly(allowed: tuple[type, ...]) -> Any:
    """Return a structure hook that takes values of these types as they are, and turns no other into one."""

    def check(value: Any, _: Any) -> Any:
        if type(value) not in allowed:
            raise TypeError(f"is {type(value).__name__}, it must be {allowed[-1].__name__}")
        return value

    return check


def _in_words(error: BaseException, kind: type[Any] | None) -> str:
    match error:
        case cattrs.ForbiddenExtraKeysError():
            return "unknown key " + ", ".join(sorted(error.extra_fields))
        case KeyError():
            return f"key {error.args[0]} is missing"
        case TypeError() if "not iterable" in str(error):
            return "must be a list"
        case _:
            return str(error)
