"""What every command has: where the configuration is, the options that mean the same everywhere, the question before it changes things."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from agent.contract.errors import NotRoot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mgmt.inventory import Inventory
    from mgmt.run import Site

DEFAULT_CONFIG: Final = Path("/etc/landfall/landfall.toml")
LAB_CONFIG: Final = Path("mgmt/etc/landfall.toml")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the configuration is, and whether it is a lab's."""

    config: Path
    lab: Path | None

    @property
    def path(self) -> Path:
        """The configuration file."""
        return self.lab / LAB_CONFIG if self.lab else self.config

    def inventory(self) -> Inventory:
        """Return the configuration."""
        from mgmt.inventory import read_inventory

        return read_inventory(self.path)

    @contextmanager
    def inside(self) -> Iterator[Inventory]:
        """Lend the configuration, inside the lab's network where there is one."""
        inventory = self.inventory()
        self._enter(inventory.network_namespace)
        yield inventory

    @contextmanager
    def site(self) -> Iterator[Site]:
        """Lend the management node at work, inside the lab's network where there is one."""
        from mgmt.run import Site

        with self.inside() as inventory, Site(inventory) as site:
            yield site

    def _enter(self, namespace: str) -> None:
        if not namespace:
            return
        from mgmt.lab.layout import NAMESPACES
        from mgmt.lab.namespace import enter

        # Inside the lab's own management node there is nothing to enter.
        if self.lab is None and not os.path.ismount(NAMESPACES / namespace):
            return
        if os.geteuid() != 0:
            raise NotRoot("a lab's network can be entered by root only")
        enter(namespace)


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
yes_option = click.option("--yes", is_flag=True, help="Do it without asking.")
transfer_option = click.option("--transfer", type=click.UUID, help="Which, if there are several.")
volume_argument = click.argument("volume")


def at_place(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command its Place as first argument."""
    return click.pass_obj(function)


def want_name(yes: bool, name: str, consequence: str) -> None:
    """Go on only if a person types the name of what is to be destroyed, or said --yes beforehand."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{consequence}: add --yes")
    if click.prompt(f"{consequence}. Type {name} to go on", err=True) != name:
        raise click.Abort


def want(yes: bool, question: str, changes: str = "this changes what the secondary holds") -> None:
    """Go on only if a person says so: beforehand by --yes, or now at a terminal."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{changes}: add --yes")
    click.confirm(question, abort=True, err=True)
