"""The service and what it remembers: watch, history, hold."""

from __future__ import annotations

import json

import click

from agent.contract.messages import to_document
from mgmt.cli.place import Place, as_json_option, at_place, volume_argument


@click.command()
@click.option("--once", is_flag=True, help="One cycle, and what it began to its end.")
@as_json_option
@at_place
def watch(place: Place, once: bool, as_json: bool) -> None:
    """Watch all volumes: replicate by schedule, go on with what broke off, say what is done and why."""
    from mgmt.watch.service import watch as serve

    with place.inside() as inventory:
        serve(inventory, (lambda sentence: click.echo(json.dumps({"said": sentence}))) if as_json else click.echo, once=once)


@click.command()
@volume_argument
@click.option("--kind", help="Only entries of this kind, such as cycle or failover.")
@click.option("--newest", type=click.IntRange(1), default=40, show_default=True, help="How many entries.")
@as_json_option
@at_place
def history(place: Place, volume: str, kind: str | None, newest: int, as_json: bool) -> None:
    """Show what was done for VOLUME, and why."""
    from mgmt.terminal import Sheet, show, show_json
    from mgmt.view import moment

    with place.site() as site:
        entries = site.catalog.history(site.catalog.volume(volume).id, kind=kind, newest=newest)
    if as_json:
        show_json([to_document(entry) for entry in entries])
        return
    rows = tuple(
        (moment(entry.at_ns), moment(entry.last_ns) if entry.times > 1 else "", str(entry.times), entry.kind, entry.sentence)
        for entry in entries
    )
    show([Sheet(("since", "last said", "times", "kind", "what and why"), rows)])


@click.command()
@volume_argument
@click.argument("generation", required=False)
@click.option("--reason", default="", help="Why it is held.")
@click.option("--release", is_flag=True, help="Let retention have it again.")
@as_json_option
@at_place
def hold(place: Place, volume: str, generation: str | None, reason: str, release: bool, as_json: bool) -> None:
    """Keep GENERATION of VOLUME whatever retention says; without GENERATION, list what is held."""
    from mgmt import run
    from mgmt.terminal import Sheet, say, show, show_json
    from mgmt.view import moment

    with place.site() as site:
        if generation is not None and release:
            run.release_hold(site, volume, generation)
        elif generation is not None:
            run.hold(site, volume, generation, reason)
        held = site.catalog.holds(site.catalog.volume(volume).id)
    if as_json:
        show_json([to_document(found) for found in held])
    elif held:
        show([Sheet(("held generation", "since", "why"), tuple((found.generation, moment(found.at_ns), found.reason) for found in held))])
    else:
        say(f"Nothing of volume {volume} is held.")
