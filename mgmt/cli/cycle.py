"""The cycle and the failure: replicate, status, salvage, statement, serve, unserve, discard."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import click

from agent.contract.messages import Differential, to_document
from mgmt.cli.place import Place, as_json_option, at_place, transfer_option, volume_argument, want, yes_option
from mgmt.sizes import Size

if TYPE_CHECKING:
    from mgmt.report import LossStatement


@click.command()
@click.argument("volumes", nargs=-1, required=True, metavar="VOLUME...")
@click.option("--together", is_flag=True, help="Freeze all of them before the first generation is taken: they are of one moment.")
@click.option("--differential", type=click.Choice([kind.value for kind in Differential]), default="verify", show_default=True)
@click.option("--streams", type=click.IntRange(1, 64), help="TCP streams.")
@click.option("--rate", type=Size(), help="Bytes per second at most, such as 50M.")
@click.option("--prepare", is_flag=True, help="Take the generation and build its differential; the next replicate sends it.")
@as_json_option
@at_place
def replicate(
    place: Place,
    volumes: tuple[str, ...],
    together: bool,
    differential: str,
    streams: int | None,
    rate: int | None,
    prepare: bool,
    as_json: bool,
) -> None:
    """Bring the newest state of VOLUME to its secondary, or go on with a transfer that was prepared or interrupted.

    Several VOLUMEs of one primary, --together: their generations are of one moment, as a database on one and its log on another need.
    """
    from mgmt import run
    from mgmt.terminal import Bars, say, show_json
    from mgmt.view import bytes_words

    if prepare and (streams is not None or rate is not None):
        raise click.UsageError("--prepare sends nothing: --streams and --rate belong to the replicate that follows")
    if len(volumes) > 1 and not together:
        raise click.UsageError("several volumes: say --together, or replicate one after the other")
    kind = Differential(differential)
    if together:
        with place.site() as site, Bars() as bars:
            sent: tuple[run.Replicated, ...] = ()
            if prepare:
                taken = run.prepare_together(site, volumes, differential=kind, tell=bars.tell)
            else:
                taken, sent = run.replicate_together(
                    site, volumes, differential=kind, streams=streams, rate_limit_bytes_s=rate, tell=bars.tell
                )
        if as_json:
            show_json({**to_document(taken), "replicated": [to_document(one) for one in sent]})
            return
        listed = ", ".join(f"{member.volume} {member.target.name}" for member in taken.members)
        how = f"frozen together for {taken.frozen_ms:.0f} ms" if taken.frozen_ms else "taken together before"
        say(f"{listed}: {how}, {'ready to be sent' if prepare else 'on both nodes'}.")
        return
    (volume,) = volumes
    if prepare:
        with place.site() as site, Bars() as bars:
            ready = run.prepare(site, volume, differential=kind, tell=bars.tell)
        how = "had been prepared before" if ready.built is None else f"{ready.built.pieces:,} pieces of {ready.built.files:,} files"
        show_json(to_document(ready)) if as_json else say(f"{ready.target.name} is ready to be sent ({how}).")
        return
    with place.site() as site, Bars() as bars:
        done = run.replicate(site, volume, differential=kind, streams=streams, rate_limit_bytes_s=rate, tell=bars.tell)
    if as_json:
        show_json(to_document(done))
        return
    how = f"resumed, {done.sent.pieces_skipped:,} pieces had arrived before" if done.resumed else f"frozen for {done.frozen_ms:.0f} ms"
    say(f"{done.target.name} is on both nodes ({how}): {bytes_words(done.sent.bytes_sent)} sent in {done.seconds:.1f} s.")


@click.command()
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


@click.command()
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
            want(yes, f"Take back what was salvaged of volume {volume}?")
            entry = run.undo(site, volume)
        show_json({"undone": entry.name}) if as_json else say(f"The salvage of volume {entry.name} is undone.")
        return

    def decide(statement: LossStatement) -> bool:
        if not yes:
            _show_statement(statement, rows=rows, as_json=False, stderr=as_json)
            want(yes, f"Store {statement.files.recovered:,} files on {statement.circumstances.secondary}?")
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


@click.command()
@volume_argument
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write it as a page to FILE.")
@click.option("--rows", type=click.IntRange(0), default=40, show_default=True, help="Files that are not recovered, on a terminal.")
@as_json_option
@at_place
def statement(place: Place, volume: str, html: Path | None, rows: int, as_json: bool) -> None:
    """Show the loss statement of VOLUME's last salvage again, also of a volume that was removed; and what was done since, by whom."""
    from mgmt import run
    from mgmt.terminal import Sheet, show
    from mgmt.view import moment

    _refuse_page(html)
    with place.site() as site:
        found = run.newest_statement(site, volume)
        deeds = run.done_since(site, found)
    _show_statement(found, rows=rows, as_json=as_json)
    if deeds and not as_json:
        show([Sheet(("done since", "", ""), tuple((moment(deed.at_ns), deed.kind, deed.sentence) for deed in deeds))], stderr=True)
    _write_page(found, html)


@click.command()
@volume_argument
@click.option("--node", help="Which node; it has to be the primary.")
@click.option("--without-peer", is_flag=True, help="The other node does not answer, and you know that it was not promoted meanwhile.")
@as_json_option
@at_place
def serve(place: Place, volume: str, node: str | None, without_peer: bool, as_json: bool) -> None:
    """Serve VOLUME from its primary, as after a reboot of it; `failover` is what makes the other node the primary."""
    from mgmt import run
    from mgmt.terminal import say, show_json

    with place.site() as site:
        facts = run.serve(site, volume, node=node, without_peer=without_peer)
    show_json(to_document(facts)) if as_json else say(f"Volume {facts.name} is served at {facts.mount_point}.")


@click.command()
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


@click.command()
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
        want(yes, "Forget them?")
        gone = run.discard(site, volume, transfer)
    if as_json:
        show_json([{"transfer": str(found), "node": node} for found, node in gone])
    else:
        for found, node in gone:
            say(f"{node} forgot transfer {found}.")


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
