"""`landfall lab`: three nodes on this machine."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import click
from click.core import ParameterSource

from agent.contract.errors import LandfallError
from mgmt.lab import lifecycle
from mgmt.lab.layout import DEFAULT_DIRECTORY, Lab, LabSubstrate, NodeName, PoolFilesystem
from mgmt.lab.lifecycle import DEFAULT_POOL_BYTES, LabStatus, Outcome
from mgmt.sizes import Size

NODE = click.Choice([node.value for node in NodeName])


def _directory(ctx: click.Context, parameter: click.Parameter, value: Path) -> Path:
    """Return --dir; where none is given, what `landfall --lab` says."""
    given = ctx.get_parameter_source("directory") is ParameterSource.COMMANDLINE
    return value if given else getattr(ctx.obj, "lab", None) or value


def _report(outcome: Outcome, done: str, already: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"outcome": outcome}))
    else:
        click.echo(done if outcome is Outcome.DONE else already, err=True)


directory_option = click.option(
    "--dir", "directory", type=click.Path(path_type=Path), default=DEFAULT_DIRECTORY, show_default=True,
    envvar="LANDFALL_LAB", callback=_directory, help="The lab's directory.",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group()
def lab() -> None:
    """Three nodes (mgmt, nas1, nas2) on this machine, with a network of their own that can be cut."""


@lab.command()
@directory_option
@json_option
@click.option("--pool-fs", type=click.Choice([kind.value for kind in PoolFilesystem]), default="xfs", show_default=True)
@click.option("--pool-size", type=Size(), default=DEFAULT_POOL_BYTES, help="Size of each NAS node's pool or volume group, sparse [12G].")
@click.option(
    "--substrate", type=click.Choice([kind.value for kind in LabSubstrate]), default="reflink", show_default=True,
    help="What volumes are kept on; lvm-* take a kernel with device-mapper.",
)  # fmt: skip
@click.option("--bare", is_flag=True, help="Start no agents.")
def up(directory: Path, as_json: bool, pool_fs: str, pool_size: int, substrate: str, bare: bool) -> None:
    """Make the lab, or start what of it does not run."""
    outcome = lifecycle.up(Lab.at(directory), PoolFilesystem(pool_fs), pool_size, agents=not bare, substrate=LabSubstrate(substrate))
    _report(outcome, "The lab is up.", "The lab is up already.", as_json)


@lab.command()
@directory_option
@json_option
def down(directory: Path, as_json: bool) -> None:
    """Take the lab away, alive or broken, with everything in it."""
    outcome = lifecycle.down(Lab.at(directory))
    _report(outcome, "The lab is gone.", "There is no lab.", as_json)


@lab.command()
@directory_option
@json_option
def status(directory: Path, as_json: bool) -> None:
    """Show the nodes, their services and the cuts."""
    found = lifecycle.status(Lab.at(directory))
    if as_json:
        click.echo(json.dumps({**asdict(found), "up": found.up}))
        return
    for line in _status_lines(found):
        click.echo(line)


@lab.command()
@click.argument("node", type=NODE)
@directory_option
@json_option
def kill(node: str, directory: Path, as_json: bool) -> None:
    """Pull the plug of NODE."""
    outcome = lifecycle.kill(Lab.at(directory), NodeName(node))
    _report(outcome, f"{node} is dead.", f"{node} was not running.", as_json)


@lab.command()
@click.argument("node", type=NODE)
@directory_option
@json_option
def start(node: str, directory: Path, as_json: bool) -> None:
    """Switch NODE on again, with the disks it had."""
    outcome = lifecycle.start_node(Lab.at(directory), NodeName(node))
    _report(outcome, f"{node} runs.", f"{node} runs already.", as_json)


@lab.command()
@click.argument("one", type=NODE)
@click.argument("other", type=NODE)
@directory_option
@json_option
def cut(one: str, other: str, directory: Path, as_json: bool) -> None:
    """Cut the link between two nodes; both still reach the third."""
    _refuse_same(one, other)
    outcome = lifecycle.cut(Lab.at(directory), NodeName(one), NodeName(other))
    _report(outcome, f"{one} and {other} are cut.", f"{one} and {other} are cut already.", as_json)


@lab.command()
@click.argument("one", type=NODE)
@click.argument("other", type=NODE)
@directory_option
@json_option
def heal(one: str, other: str, directory: Path, as_json: bool) -> None:
    """Mend the link between two nodes."""
    _refuse_same(one, other)
    outcome = lifecycle.heal(Lab.at(directory), NodeName(one), NodeName(other))
    _report(outcome, f"{one} and {other} are connected.", f"{one} and {other} were connected already.", as_json)


@lab.command()
@directory_option
def inventory(directory: Path) -> None:
    """Print the nodes as an Ansible inventory, for the tag `configuration` of playbooks/provision.yml."""
    from mgmt.lab import ansible

    click.echo(ansible.inventory(Lab.at(directory)))


@lab.command(name="exec", context_settings={"ignore_unknown_options": True})
@directory_option
@click.argument("node", type=NODE)
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(node: str, directory: Path, argv: tuple[str, ...]) -> None:
    """Run a program on NODE, as from its console."""
    command = lifecycle.inside(Lab.at(directory), NodeName(node), argv)
    os.execvp(command[0], command)  # noqa: S606 - the console becomes the program, nothing is started


def _refuse_same(one: str, other: str) -> None:
    if one == other:
        raise click.UsageError(f"a link has two ends; {one} is both")


def _status_lines(found: LabStatus) -> list[str]:
    if found.marker is None:
        return [f"{found.directory}: no lab"]
    lines = [f"{found.directory}: {'up' if found.up else 'not complete'}, {found.marker.substrate}, pools on {found.marker.pool_fs}"]
    for node in found.nodes:
        services = ", ".join(f"{service.name} {'runs' if service.pid else 'does not run'}" for service in node.services)
        state = f"pid {node.pid}, {services}" if node.pid else "dead"
        lines.append(f"{node.name:5} {node.address:11} {node.namespace}: {state}")
    return lines + [f"cut: {' and '.join(ends)}" for ends in found.cut]


def main() -> None:
    """Run `python -m mgmt.lab`."""
    # A terminated command cleans up as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        lab(standalone_mode=False)
    except LandfallError as error:
        click.echo(str(error), err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted; what was being made is taken away again.", err=True)
        sys.exit(130)
