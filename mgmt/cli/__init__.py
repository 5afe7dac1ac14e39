"""``landfall``: the commands, a module for each group of them.

Standard output is data, standard error is talk; an error is printed once and its class gives the exit code: 0 done, 2 the command line is
wrong, 130 interrupted, and those of `landfall explain`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Final, NoReturn

import click

from agent.contract.errors import LandfallError, PathRefused
from mgmt.cli import charge, cycle, failover, upkeep, volumes, watching, words
from mgmt.cli.place import DEFAULT_CONFIG, Place

LATER: Final = {"lab": ("mgmt.lab.cli", "lab"), "drill": ("mgmt.drill.cli", "drill")}
"""Commands of other packages, imported when they are called."""


class _Landfall(click.Group):
    """The commands of this module, and those of other packages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names; of what is not installed, none."""
        return sorted([*super().list_commands(ctx), *(name for name in LATER if self.get_command(ctx, name))])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, imported now if it is another package's."""
        if cmd_name not in LATER:
            return super().get_command(ctx, cmd_name)
        module, name = LATER[cmd_name]
        if importlib.util.find_spec(module) is None:
            return None
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.group(cls=_Landfall)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    default=DEFAULT_CONFIG,
    envvar="LANDFALL_CONFIG",
    show_default=True,
    help="Configuration file.",
)
@click.option(
    "--lab", "lab_directory", type=click.Path(path_type=Path), envvar="LANDFALL_LAB", help="Manage this local lab's nodes instead."
)
@click.version_option(package_name="landfall")
@click.pass_context
def landfall(ctx: click.Context, config: Path, lab_directory: Path | None) -> None:
    """Landfall: every file that reached the other shore survives."""
    ctx.obj = Place(config, lab_directory)


for command in (
    volumes.volume,
    cycle.replicate,
    cycle.status,
    cycle.salvage,
    cycle.statement,
    cycle.serve,
    cycle.unserve,
    cycle.discard,
    failover.failover,
    failover.failback,
    failover.resync,
    failover.rescue,
    watching.watch,
    watching.history,
    watching.hold,
    upkeep.check,
    upkeep.losses,
    upkeep.restore,
    upkeep.support_bundle,
    upkeep.verify,
    charge.takeover,
    words.explain,
    words.check_config,
):
    landfall.add_command(command)


def main() -> None:
    """Run ``landfall``."""
    # paramiko logs from threads of its own what reaches us as an exception; without a handler that would land on standard error.
    logging.getLogger("paramiko").addHandler(logging.NullHandler())
    _hear_interrupts()
    try:
        status_code = landfall(standalone_mode=False)
        sys.stdout.flush()
    except LandfallError as error:
        _fail(error)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to break off, and the exit status is to be ours
        sys.stderr.write("landfall: interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output went away: that is no error of ours, and there is nowhere left to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(_of_system(error))
    sys.exit(status_code if isinstance(status_code, int) else 0)


def _hear_interrupts() -> None:
    """Let Ctrl-C end a command with its cleaning up, which a second one does not break off; a third does. To be terminated is the same."""
    heard = 0

    def hear(number: int, frame: object) -> None:
        nonlocal heard
        heard += 1
        if heard == 2:
            os.write(sys.stderr.fileno(), b"landfall: cleaning up; once more breaks that off, and something may stay behind\n")
        else:
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, hear)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # who started us may want it ignored
        signal.signal(signal.SIGINT, hear)


def _of_system(error: OSError) -> LandfallError:
    """Return what the operating system refused, as an error that names the file and the reason."""
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return PathRefused(f"{where}{error.strerror or error}")


def _fail(error: LandfallError) -> NoReturn:
    from mgmt.terminal import say, show_json

    say(f"landfall: {error}")
    for note in getattr(error, "__notes__", ()):
        say(f"landfall: {note}")
    if "--json" in sys.argv:
        show_json({"error": error.to_wire()})
    sys.exit(error.exit_code)
