"""A volume changes sides: failover."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mgmt.cli.place import Place, as_json_option, at_place, volume_argument, want, yes_option

if TYPE_CHECKING:
    from mgmt.failover.plan import Plan


@click.command()
@volume_argument
@click.option("--planned", is_flag=True, help="Both nodes live: hand the volume over without loss.")
@click.option("--dry-run", is_flag=True, help="Show the steps and change nothing.")
@click.option("--declare-dead", is_flag=True, help="Give the primary up although it is seen; it is fenced first.")
@click.option("--force", is_flag=True, help="Promote without proof that the primary cannot write: recorded as a split brain.")
@click.option("--confirm-fenced", metavar="NODE", default="", help="Say beforehand what the fence `manual` would ask.")
@yes_option
@as_json_option
@at_place
def failover(
    place: Place,
    volume: str,
    planned: bool,
    dry_run: bool,
    declare_dead: bool,
    force: bool,
    confirm_fenced: str,
    yes: bool,
    as_json: bool,
) -> None:
    """Let VOLUME's secondary take over: fence, recover, promote, address, exports. One that was broken off goes on where it stopped."""
    from mgmt.failover import driver, view
    from mgmt.failover.plan import Wish
    from mgmt.terminal import Bars, show, show_json

    if planned and (declare_dead or force):
        raise click.UsageError("--planned needs a primary that lives: it goes neither with --declare-dead nor with --force")
    wish = Wish(planned, declare_dead, force)
    if dry_run:
        with place.site() as site:
            made, first = driver.preview(site, volume, wish)
        show_json(view.plan_document(made, first)) if as_json else show([view.plan_sheet(made, first)])
        return

    def decide(made: Plan) -> bool:
        if not yes:
            show([view.plan_sheet(made, made.steps[0])], stderr=True)
        want(yes, f"Let {made.target} take {made.name} over?", f"this makes {made.target} the primary")
        return True

    with place.site() as site, Bars() as bars:
        done = driver.failover(site, volume, wish, confirmed=confirm_fenced, decide=decide, tell=bars.tell)
    if done is not None:
        show_json(view.account_document(done)) if as_json else show(view.account_sheets(done))
