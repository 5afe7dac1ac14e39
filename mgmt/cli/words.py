"""Words about Landfall itself: what an error means, whether a configuration is right."""

from __future__ import annotations

import click

from agent.contract.errors import LandfallError, by_code
from agent.contract.errors import explain as explain_code
from mgmt.cli.place import Place, as_json_option, at_place


@click.command()
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


@click.command("check-config")
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


def _first_sentence(kind: type[LandfallError]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]
