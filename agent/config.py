"""The agent's configuration: one TOML file, every key known, every refusal naming the key. agent.toml.sample has them all."""

from __future__ import annotations

import tomllib
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from agent.contract.errors import ConfigInvalid, NameRefused, RequestRefused
from agent.contract.identity import plain_name
from agent.serving import nfs
from agent.system.priority import IoPriority

LEAST_MARGIN_S: Final = 10.0
"""A node begins to give a volume up so long before its lease ends; the steps have half of that, and 5 s are left."""

SUBSTRATES: Final = ("reflink", "lvm-thin", "lvm-snapshot")


@dataclass(frozen=True, slots=True)
class Config:
    """What an agent is told about its node."""

    node: str
    replication_address: str
    state_dir: Path = Path("/var/lib/landfall/state")
    pool_dir: Path = Path("/var/lib/landfall/pool")
    run_dir: Path = Path("/run/landfall")
    socket: Path = Path("/run/landfall/agent.sock")
    mount_dir: Path = Path("/srv/landfall")
    freeze_limit_s: float = 10.0
    smb_port: int = 445
    smb_guest: bool = False
    nfs_clients: tuple[str, ...] = ()
    nfs_security: tuple[nfs.Security, ...] = (nfs.Security.SYS,)
    nfs_squash: nfs.Squash = nfs.Squash.ROOT
    lab: bool = False
    substrate: str = "reflink"
    volume_group: str = ""
    snapshot_percent: float = 25.0
    metrics_textfile: str = ""
    service_interface: str = ""
    lease_margin_s: float = LEAST_MARGIN_S
    io_priority: IoPriority = IoPriority.NORMAL


def read_config(path: Path) -> Config:
    """Return the configuration in ``path``; ConfigInvalid names the first key that is missing, unknown or of the wrong type."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        fix = "Name the configuration with --config; agent.toml.sample has every key."
        raise ConfigInvalid(f"{path} cannot be read", cause=error.strerror or str(error), fix=fix) from error
    except ValueError as error:
        fix = "Correct the line; `check-config` proves it."
        raise ConfigInvalid(f"{path} cannot be read as TOML", cause=str(error), fix=fix) from error
    known = {field.name: field for field in fields(Config)}
    for key in document:
        if key not in known:
            raise ConfigInvalid(f"{path}: {key} is not a key of the agent's configuration")
    values = {}
    for key, field in known.items():
        if key in document:
            values[key] = _typed(path, key, document[key], str(field.type))
        elif field.default is MISSING:
            raise ConfigInvalid(f"{path}: {key} is missing")
    config = Config(**values)
    try:
        plain_name(config.node)
    except NameRefused as error:
        raise ConfigInvalid(f"{path}: node: {error.message}") from error
    if config.substrate not in SUBSTRATES:
        raise ConfigInvalid(f"{path}: substrate is {config.substrate}, it must be one of {', '.join(SUBSTRATES)}")
    if config.substrate.startswith("lvm-") != bool(config.volume_group):
        raise ConfigInvalid(f"{path}: volume_group is named if and only if substrate is lvm-thin or lvm-snapshot")
    if not 0 < config.snapshot_percent <= 100:
        raise ConfigInvalid(f"{path}: snapshot_percent is {config.snapshot_percent:g}, it must be more than 0 and at most 100")
    if config.io_priority not in set(IoPriority):
        raise ConfigInvalid(f"{path}: io_priority is {config.io_priority}, it must be one of {', '.join(IoPriority)}")
    if config.lease_margin_s < (0.5 if config.lab else LEAST_MARGIN_S):
        raise ConfigInvalid(f"{path}: lease_margin_s is {config.lease_margin_s:g}, it must be {LEAST_MARGIN_S:g} or more")
    return replace(_with_nfs(path, config), io_priority=IoPriority(config.io_priority))


def _with_nfs(path: Path, config: Config) -> Config:
    """Return the configuration with what it says of NFS as the agent works with it."""
    try:
        clients = tuple(dict.fromkeys(nfs.client(text) for text in config.nfs_clients))
    except RequestRefused as error:
        raise ConfigInvalid(f"{path}: nfs_clients: {error.message}", cause=error.cause, fix=error.fix_now) from error
    if not config.nfs_security or not set(config.nfs_security) <= set(nfs.Security):
        raise ConfigInvalid(f"{path}: nfs_security is {list(config.nfs_security)}, it must be some of {', '.join(nfs.Security)}")
    if config.nfs_squash not in set(nfs.Squash):
        raise ConfigInvalid(f"{path}: nfs_squash is {config.nfs_squash}, it must be one of {', '.join(nfs.Squash)}")
    if clients and (problem := nfs.folder_problem(config.mount_dir)):
        raise ConfigInvalid(f"{path}: mount_dir: {problem}")
    security = tuple(nfs.Security(text) for text in dict.fromkeys(config.nfs_security))
    return replace(config, nfs_clients=clients, nfs_security=security, nfs_squash=nfs.Squash(config.nfs_squash))


def _typed(path: Path, key: str, value: Any, kind: str) -> Any:
    scalars: dict[str, tuple[type, ...]] = {"float": (int, float), "int": (int,), "bool": (bool,)}
    allowed = (list,) if kind.startswith("tuple") else scalars.get(kind, (str,))
    if type(value) not in allowed:
        raise ConfigInvalid(f"{path}: {key} is {type(value).__name__}, it must be {allowed[0].__name__}")
    if kind.startswith("tuple"):
        if not all(type(one) is str for one in value):
            raise ConfigInvalid(f"{path}: {key} must hold strings alone")
        return tuple(value)
    if kind == "Path":
        if not value.startswith("/"):
            raise ConfigInvalid(f"{path}: {key} must be an absolute path")
        return Path(value)
    return value
