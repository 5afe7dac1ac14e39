"""``landfall``: the commands. Standard output is data, standard error is talk; an error is printed once and its class gives the exit code.

Exit codes: 0 done, 2 the command line is wrong, 130 interrupted, and those of `landfall explain`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn
from uuid import UUID

import click

from agent.contract.errors import LandfallError, NotRoot, PathRefused, by_code
from agent.contract.errors import explain as explain_code
from agent.contract.identity import FilesystemKind
from agent.contract.messages import Deletions, Differential, to_document
from mgmt.sizes import Size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mgmt.determination import AtomicSet
    from mgmt.inventory import Inventory
    from mgmt.report import LossStatement
    from mgmt.run import Site

DEFAULT_CONFIG: Final = Path("/etc/landfall/landfall.toml")
LAB_CONFIG: Final = Path("mgmt/etc/landfall.toml")
LEVEL_DIGITS: Final = 9
LATER: Final = {"lab": ("mgmt.lab.cli", "lab"), "drill": ("mgmt.drill.cli", "drill")}
"""Commands of other packages, imported when they are called."""


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
    def site(self) -> Iterator[Site]:
        """Lend the management node at work, inside the lab's network where there is one."""
        from mgmt.run import Site

        inventory = self.inventory()
        self._enter(inventory.network_namespace)
        with Site(inventory) as site:
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


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
yes_option = click.option("--yes", is_flag=True, help="Do it without asking.")
transfer_option = click.option("--transfer", type=click.UUID, help="Which, if there are several.")
volume_argument = click.argument("volume")


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


def at_place(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command its Place as first argument."""
    return click.pass_obj(function)


# --- volumes ---


@landfall.group()
def volume() -> None:
    """Volumes and what is laid down for them."""


def rules(function: Callable[..., None]) -> Callable[..., None]:
    """The options of a volume's policy."""
    for option in (
        click.option(
            "--deletions", type=click.Choice([kind.value for kind in Deletions]), help="What a partial salvage does with deleted files."
        ),
        click.option(
            "--priority", "priorities", multiple=True, metavar="PREFIX=LEVEL", help="Send what is below PREFIX earlier; higher is earlier."
        ),
        click.option("--atomic", multiple=True, metavar="NAME=PATTERN", help="All or none of these files; give a NAME several times."),
    ):
        function = option(function)
    return function


@volume.command("add")
@click.argument("name")
@click.option("--fs", "filesystem", type=click.Choice([kind.value for kind in FilesystemKind]), default="ext4", show_default=True)
@click.option("--size", type=Size(), required=True, help="Such as 10G.")
@click.option("--primary", help="The node that serves it; without it, the first of two.")
@click.option("--secondary", help="The node that holds its replica; without it, the second of two.")
@click.option("--sector", type=click.Choice(["512", "4096"]), default="512", show_default=True)
@click.option("--mkfs-option", "mkfs_options", multiple=True, help="Passed on to mkfs, a word each.")
@rules
@as_json_option
@at_place
def volume_add(
    place: Place,
    name: str,
    filesystem: str,
    size: int,
    primary: str | None,
    secondary: str | None,
    sector: str,
    mkfs_options: tuple[str, ...],
    deletions: str | None,
    priorities: tuple[str, ...],
    atomic: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make volume NAME on the primary and get the secondary ready for its replica."""
    from mgmt import run
    from mgmt.determination import Policy
    from mgmt.terminal import say, show_json

    levels, sets = _levels(priorities), _sets(atomic)
    with place.site() as site:
        names = site.inventory.names
        if (primary is None or secondary is None) and len(names) != 2:
            raise click.UsageError("name --primary and --secondary: there are not exactly two nodes")
        primary = primary or next(node for node in names if node != secondary)
        secondary = secondary or next(node for node in names if node != primary)
        if primary == secondary:
            raise click.UsageError(f"a volume needs two nodes; {primary} is both its primary and its secondary")
        facts = run.add_volume(
            site,
            name,
            filesystem=FilesystemKind(filesystem),
            size_bytes=size,
            primary=primary,
            secondary=secondary,
            policy=Policy(Deletions(deletions or Deletions.HOLD), sets),
            priorities=levels,
            sector_bytes=int(sector),
            mkfs_options=mkfs_options,
        )
    if as_json:
        show_json(to_document(facts))
    else:
        say(f"Volume {name} is served by {primary} at {facts.mount_point}.")


@volume.command("list")
@as_json_option
@at_place
def volume_list(place: Place, as_json: bool) -> None:
    """List the volumes and what is laid down for them."""
    from mgmt import run
    from mgmt.terminal import Sheet, show, show_json
    from mgmt.view import bytes_words

    with place.site() as site:
        entries = run.list_volumes(site)
    if as_json:
        show_json([to_document(entry) for entry in entries])
        return
    rows = tuple(
        (
            entry.name,
            entry.filesystem.value,
            bytes_words(entry.size_bytes),
            entry.primary,
            entry.secondary,
            entry.policy.deletions.value,
            ", ".join(f"{prefix}={level}" for prefix, level in entry.priorities) or "-",
            ", ".join(atomic.name for atomic in entry.policy.atomic_sets) or "-",
        )
        for entry in entries
    )
    show([Sheet(("volume", "filesystem", "size", "primary", "secondary", "deletions", "priorities", "atomic sets"), rows)])


@volume.command("set")
@volume_argument
@rules
@click.option("--no-priorities", is_flag=True, help="Forget all priorities first.")
@click.option("--no-atomic", is_flag=True, help="Forget all atomic sets first.")
@as_json_option
@at_place
def volume_set(
    place: Place,
    volume: str,
    deletions: str | None,
    priorities: tuple[str, ...],
    atomic: tuple[str, ...],
    no_priorities: bool,
    no_atomic: bool,
    as_json: bool,
) -> None:
    """Lay down policy for VOLUME; what is not given stays."""
    from mgmt import run
    from mgmt.determination import Policy
    from mgmt.terminal import say, show_json

    levels, sets = _levels(priorities), _sets(atomic)
    with place.site() as site:
        entry = site.catalog.volume(volume)
        kept = {found.name: found for found in (() if no_atomic else entry.policy.atomic_sets)} | {found.name: found for found in sets}
        wanted = dict(() if no_priorities else entry.priorities) | dict(levels)
        policy = Policy(Deletions(deletions) if deletions else entry.policy.deletions, tuple(kept.values()))
        entry = run.set_volume(site, volume, policy=policy, priorities=tuple(wanted.items()))
    if as_json:
        show_json(to_document(entry))
    else:
        say(f"Volume {entry.name} has its policy.")


# --- the cycle ---


@landfall.command()
@volume_argument
@click.option("--differential", type=click.Choice([kind.value for kind in Differential]), default="verify", show_default=True)
@click.option("--streams", type=click.IntRange(1, 64), help="TCP streams.")
@click.option("--rate", type=Size(), help="Bytes per second at most, such as 50M.")
@click.option("--prepare", is_flag=True, help="Take the generation and build its differential; the next replicate sends it.")
@as_json_option
@at_place
def replicate(place: Place, volume: str, differential: str, streams: int | None, rate: int | None, prepare: bool, as_json: bool) -> None:
    """Bring the newest state of VOLUME to its secondary, or go on with a transfer that was prepared or interrupted."""
    from mgmt import run
    from mgmt.terminal import Bars, say, show_json
    from mgmt.view import bytes_words

    if prepare:
        if streams is not None or rate is not None:
            raise click.UsageError("--prepare sends nothing: --streams and --rate belong to the replicate that follows")
        with place.site() as site, Bars() as bars:
            ready = run.prepare(site, volume, differential=Differential(differential), tell=bars.tell)
        how = "had been prepared before" if ready.built is None else f"{ready.built.pieces:,} pieces of {ready.built.files:,} files"
        show_json(to_document(ready)) if as_json else say(f"{ready.target.name} is ready to be sent ({how}).")
        return
    with place.site() as site, Bars() as bars:
        done = run.replicate(
            site, volume, differential=Differential(differential), streams=streams, rate_limit_bytes_s=rate, tell=bars.tell
        )
    if as_json:
        show_json(to_document(done))
        return
    how = f"resumed, {done.sent.pieces_skipped:,} pieces had arrived before" if done.resumed else f"frozen for {done.frozen_ms:.0f} ms"
    say(f"{done.target.name} is on both nodes ({how}): {bytes_words(done.sent.bytes_sent)} sent in {done.seconds:.1f} s.")


@landfall.command()
@click.argument("volume", required=False)
@as_json_option
@at_place
def status(place: Place, volume: str | None, as_json: bool) -> None:
    """Show how volumes stand, and what a salvage would bring if the primary died now."""
    from mgmt import run
    from mgmt.standing import document, sheets
    from mgmt.terminal import say, show, show_json

    with place.site() as site:
        names = [volume] if volume else [entry.name for entry in run.list_volumes(site)]
        found = [run.standing(site, name) for name in names]
    if as_json:
        show_json([document(standing) for standing in found])
        return
    if not found:
        say("There is no volume yet; `landfall volume add` makes one.")
    for standing in found:
        show(sheets(standing))


@landfall.command()
@volume_argument
@click.option("--undo", is_flag=True, help="Take the salvage back; its transfer is resumable again.")
@click.option("--dry-run", is_flag=True, help="Show the verdicts and change nothing.")
@click.option("--declare-dead", is_flag=True, help="Salvage although the primary answers.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write the loss statement as a page to FILE.")
@click.option("--rows", type=click.IntRange(0), default=40, show_default=True, help="Files that are not recovered, on a terminal.")
@transfer_option
@yes_option
@as_json_option
@at_place
def salvage(
    place: Place,
    volume: str,
    undo: bool,
    dry_run: bool,
    declare_dead: bool,
    html: Path | None,
    rows: int,
    transfer: UUID | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Recover on the secondary every file that arrived whole before the primary died, and say what became of every other."""
    from mgmt import run
    from mgmt.terminal import Bars, say, show_json

    _refuse_page(html)
    if undo:
        with place.site() as site:
            _want(yes, f"Take back what was salvaged of volume {volume}?")
            entry = run.undo(site, volume)
        show_json({"undone": entry.name}) if as_json else say(f"The salvage of volume {entry.name} is undone.")
        return

    def decide(statement: LossStatement) -> bool:
        if not yes:
            _show_statement(statement, rows=rows, as_json=False, stderr=as_json)
            _want(yes, f"Store {statement.files.recovered:,} files on {statement.circumstances.secondary}?")
        return True

    with place.site() as site:
        if dry_run:
            with Bars() as bars:
                statement: LossStatement | None = run.verdicts(site, volume, transfer=transfer, tell=bars.tell).statement
        elif yes:
            with Bars() as bars:
                statement = run.salvage_volume(site, volume, transfer=transfer, declare_dead=declare_dead, tell=bars.tell)
        else:
            statement = run.salvage_volume(site, volume, transfer=transfer, declare_dead=declare_dead, decide=decide)
    if statement is not None:
        _show_statement(statement, rows=rows, as_json=as_json)
        _write_page(statement, html)


@landfall.command()
@volume_argument
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write it as a page to FILE.")
@click.option("--rows", type=click.IntRange(0), default=40, show_default=True, help="Files that are not recovered, on a terminal.")
@as_json_option
@at_place
def statement(place: Place, volume: str, html: Path | None, rows: int, as_json: bool) -> None:
    """Show the loss statement of VOLUME's last salvage again."""
    _refuse_page(html)
    with place.site() as site:
        found = site.catalog.newest_salvage(site.catalog.volume(volume).id).statement
    _show_statement(found, rows=rows, as_json=as_json)
    _write_page(found, html)


@landfall.command()
@volume_argument
@click.option("--node", help="Which node; without it, the secondary.")
@click.option("--declare-dead", is_flag=True, help="Serve without asking the other node.")
@as_json_option
@at_place
def serve(place: Place, volume: str, node: str | None, declare_dead: bool, as_json: bool) -> None:
    """Serve VOLUME from its secondary (or from NODE): its newest generation, mounted and exported."""
    from mgmt import run
    from mgmt.terminal import say, show_json

    with place.site() as site:
        facts = run.serve(site, volume, node=node, declare_dead=declare_dead)
    show_json(to_document(facts)) if as_json else say(f"Volume {facts.name} is served at {facts.mount_point}.")


@landfall.command()
@volume_argument
@click.option("--node", help="Which node; without it, the primary.")
@as_json_option
@at_place
def unserve(place: Place, volume: str, node: str | None, as_json: bool) -> None:
    """Stop serving VOLUME on its primary (or on NODE)."""
    from mgmt import run
    from mgmt.terminal import say, show_json

    with place.site() as site:
        facts = run.unserve(site, volume, node=node)
    show_json(to_document(facts)) if as_json else say(f"Volume {facts.name} is not served any more.")


@landfall.command()
@volume_argument
@transfer_option
@yes_option
@as_json_option
@at_place
def discard(place: Place, volume: str, transfer: UUID | None, yes: bool, as_json: bool) -> None:
    """Give up VOLUME's open transfers: what arrived of them is forgotten."""
    from mgmt import run
    from mgmt.terminal import say, show_json

    with place.site() as site:
        if not yes:
            listed = [facts for facts in run.standing(site, volume).open_transfers if transfer in {None, facts.id}]
            say("\n".join(f"{facts.id}: {run.gauge_of(facts).sentence} arrived" for facts in listed) or "No open transfer is known.")
        _want(yes, "Forget them?")
        gone = run.discard(site, volume, transfer)
    if as_json:
        show_json([{"transfer": str(found), "node": node} for found, node in gone])
    else:
        for found, node in gone:
            say(f"{node} forgot transfer {found}.")


# --- words ---


@landfall.command()
@click.argument("code", required=False)
@as_json_option
def explain(code: str | None, as_json: bool) -> None:
    """Say what error CODE means and what to do; without CODE, list them all."""
    from mgmt.terminal import Sheet, show, show_json

    classes = by_code()
    if code is None:
        if as_json:
            show_json({found: explain_code(found) for found in classes})
        else:
            rows = ((found.code, str(found.exit_code), found.retry.value, _first_sentence(found)) for found in classes.values())
            show([Sheet(("code", "exit status", "retry", "meaning"), tuple(sorted(rows, key=lambda row: int(row[1]))))])
        return
    text = explain_code(code)
    if text is None:
        raise click.BadParameter(f"there is no error {code!r}; `landfall explain` lists them", param_hint="CODE")
    if as_json:
        found = classes[code]
        show_json({"code": code, "exit_code": found.exit_code, "retry": found.retry.value, "meaning": found.__doc__, "fix": found.fix})
    else:
        click.echo(text)


@landfall.command("check-config")
@as_json_option
@at_place
def check_config(place: Place, as_json: bool) -> None:
    """Prove the configuration file; nothing is connected."""
    from mgmt.terminal import say, show_json

    inventory = place.inventory()
    if as_json:
        show_json({"path": str(place.path), "nodes": list(inventory.names)})
    else:
        say(f"{place.path} is right: {', '.join(inventory.names) or 'no nodes'}.")


# --- steps ---


def _levels(priorities: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    found = []
    for text in priorities:
        prefix, _, level = text.rpartition("=")
        digits = level.removeprefix("-")
        if not digits.isascii() or not digits.isdigit() or len(digits) > LEVEL_DIGITS:
            raise click.BadParameter(f"{text!r} is not PREFIX=LEVEL, such as mail=5", param_hint="--priority")
        found.append((prefix, int(level)))
    return tuple(found)


def _sets(atomic: tuple[str, ...]) -> tuple[AtomicSet, ...]:
    from mgmt.determination import AtomicSet

    patterns: dict[str, list[str]] = {}
    for text in atomic:
        name, _, pattern = text.partition("=")
        if not name or not pattern:
            raise click.BadParameter(f"{text!r} is not NAME=PATTERN", param_hint="--atomic")
        patterns.setdefault(name, []).append(pattern)
    return tuple(AtomicSet(name, tuple(listed)) for name, listed in patterns.items())


def _want(yes: bool, question: str) -> None:
    """Go on only if a person says so: beforehand by --yes, or now at a terminal."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError("this changes what the secondary holds: add --yes")
    click.confirm(question, abort=True, err=True)


def _show_statement(statement: LossStatement, *, rows: int, as_json: bool, stderr: bool = False) -> None:
    from rich.console import Console

    from mgmt.view import print_table, to_json

    if as_json:
        click.echo(to_json(statement))
    else:
        print_table(statement, Console(highlight=False, stderr=stderr), rows=rows)


def _refuse_page(path: Path | None) -> None:
    """Say before anything is done that a page could not be written."""
    if path is not None and not os.access(path if path.exists() else path.parent, os.W_OK):
        raise click.BadParameter(f"{str(path)!r} cannot be written", param_hint="--html")


def _write_page(statement: LossStatement, path: Path | None) -> None:
    from mgmt.terminal import say
    from mgmt.view import to_html

    if path is not None:
        path.write_text(to_html(statement), encoding="utf-8")
        say(f"The loss statement is in {path}.")


def _first_sentence(kind: type[LandfallError]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


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


if __name__ == "__main__":
    main()
