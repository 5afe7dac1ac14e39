"""`landfall takeover`: which management node the agents obey."""

from __future__ import annotations

import click

from mgmt.cli.place import Place, as_json_option, at_place, want, yes_option


@click.command()
@yes_option
@as_json_option
@at_place
def takeover(place: Place, yes: bool, as_json: bool) -> None:
    """Put this management node in charge: the agents obey no other any more.

    For a second management node, or one whose catalog was restored from a copy.
    """
    from mgmt.terminal import say, show_json

    want(yes, "Every other management node is refused from now on. Take over?")
    with place.site() as site:
        term = site.take_over()
    if as_json:
        show_json({"term": term})
    else:
        say(f"this management node is in charge, in term {term}")
