"""A volume changes sides: failover, and the way back: resync, rescue, failback."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from agent.contract.errors import LandfallError, ReplicaDiffers, RestoreIncomplete
from agent.contract.messages import to_document
from agent.system.clock import wall_ns
from mgmt.cli.place import Place, as_json_option, at_place, volume_argument, want, yes_option

if TYPE_CHECKING:
    from mgmt.catalog import VolumeEntry
    from mgmt.failover.failback import Agreement
    from mgmt.failover.plan import Plan
    from mgmt.failover.rehearsal import Rehearsal
    from mgmt.failover.rescue import RescuePlan
    from mgmt.run import Site, Teller

rows_option = click.option("--rows", type=click.IntRange(0), default=40, show_default=True, help="Files of each list, on a terminal.")


@click.command()
@volume_argument
@click.option("--planned", is_flag=True, help="Both nodes live: hand the volume over without loss.")
@click.option("--dry-run", is_flag=True, help="Show the steps and change nothing.")
@click.option("--test", "rehearsed", is_flag=True, help="Read, compare and mount what would be served, and change nothing.")
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
    rehearsed: bool,
    declare_dead: bool,
    force: bool,
    confirm_fenced: str,
    yes: bool,
    as_json: bool,
) -> None:
    """Let VOLUME's secondary take over: fence, recover, promote, address, exports. One that was broken off goes on where it stopped."""
    from mgmt.failover import driver, view
    from mgmt.failover.plan import Wish
    from mgmt.terminal import Bars, say, show, show_json

    if planned and (declare_dead or force):
        raise click.UsageError("--planned needs a primary that lives: it goes neither with --declare-dead nor with --force")
    if rehearsed:
        with place.site() as site, Bars() as bars:
            found = _rehearsed(site, volume, bars.tell)
        show_json(view.rehearsal_document(found)) if as_json else say(f"{found.sentence}.")
        if not found.sound:
            raise ReplicaDiffers(
                f"what {found.node} would serve of volume {volume} is not sound", fix=f"`landfall verify {volume} --heal`."
            )
        return
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


def _rehearsed(site: Site, volume: str, tell: Teller) -> Rehearsal:
    """Rehearse, and keep what that proved or did not."""
    from mgmt import proofs
    from mgmt.failover.rehearsal import rehearse

    begun_ns, folder = wall_ns(), site.inventory.state_dir
    name = site.catalog.volume(volume).name
    try:
        found = rehearse(site, volume, tell)
    except LandfallError as error:
        proofs.keep(folder, proofs.Proof(begun_ns, proofs.REHEARSAL, name, "failed", False, None, None, "", str(error)))
        raise
    verdict = "sound" if found.sound else "unsound"
    proofs.keep(folder, proofs.Proof(begun_ns, proofs.REHEARSAL, name, verdict, found.sound, found.behind_s, None, "", found.sentence))
    return found


@click.command()
@volume_argument
@click.option(
    "--discard-from", metavar="NODE", required=True, help="The node that follows from now on; what it holds is kept and listed first."
)
@rows_option
@yes_option
@as_json_option
@at_place
def resync(place: Place, volume: str, discard_from: str, rows: int, yes: bool, as_json: bool) -> None:
    """Let the node that was overtaken follow VOLUME's primary again; ends a split brain."""
    from mgmt.failover import failback as way_back
    from mgmt.failover import view
    from mgmt.terminal import Bars, show, show_json

    with place.site() as site, Bars() as bars:
        followed = way_back.resync(site, volume, discard_from, agree=_agreement(yes), tell=bars.tell)
    if followed is not None:
        show_json(view.followed_document(followed)) if as_json else show(view.followed_sheets(followed, rows))


@click.command()
@volume_argument
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.option("--all", "everything", is_flag=True, help="Every file that is listed.")
@click.option("--to", "folder", metavar="DIR", help="Beneath this folder of the volume, instead of beside the originals.")
@click.option("--in-place", is_flag=True, help="In place of what is there now.")
@click.option("--generation", help="The kept generation, by name; without it, the newest.")
@rows_option
@click.option("--yes", is_flag=True, help="Do it without asking; what was changed at its place meanwhile is replaced too.")
@as_json_option
@at_place
def rescue(
    place: Place,
    volume: str,
    paths: tuple[str, ...],
    everything: bool,
    folder: str | None,
    in_place: bool,
    generation: str | None,
    rows: int,
    yes: bool,
    as_json: bool,
) -> None:
    """Bring files that only the node which was overtaken still has to where VOLUME is served; without PATHs, list them.

    PATHs are files or folders of the list, relative to the volume's root. Each comes to lie beside its original, under a name that says
    where it is from, unless --to or --in-place says otherwise. Clients and replication go on.
    """
    from mgmt.failover import rescue as rescuing
    from mgmt.failover import view
    from mgmt.terminal import Bars, Sheet, say, show, show_json

    if in_place and folder is not None:
        raise click.UsageError("--to and --in-place exclude each other")
    if everything and paths:
        raise click.UsageError("name files, or say --all")
    if not paths and not everything:
        with place.site() as site:
            lists = rescuing.kept_lists(site, volume, generation)
        show_json(to_document(lists)) if as_json else show([view.held_sheet(lists, rows)])
        return

    def agree(plan: RescuePlan) -> bool:
        if in_place and not yes:
            show([view.conflicts_sheet(plan, rows)], stderr=True)
            question = f"Put {len(plan.files):,} files of {plan.lists.node}'s {plan.lists.kept.name} in their place on {plan.server}?"
            want(yes, question, "this replaces files of the volume")
        return True

    destination = rescuing.Destination(in_place, folder or "")
    with place.site() as site, Bars(quiet=as_json) as bars:
        done = rescuing.rescue(site, volume, paths, destination, generation=generation, replace=yes, agree=agree, tell=bars.tell)
    if done is None:
        return
    if as_json:
        show_json({**to_document(done), "sentence": done.sentence})
        click.get_current_context().exit(RestoreIncomplete.exit_code if done.refused else 0)
    show([view.placed_sheet(done, rows)])
    say(f"{done.sentence}.")
    if done.refused:
        show([Sheet(("not brought", "because"), tuple((refused.path, refused.reason) for refused in done.refused))])
        raise RestoreIncomplete(f"{len(done.refused)} files of {done.generation} are not brought")


@click.command()
@volume_argument
@rows_option
@yes_option
@as_json_option
@at_place
def failback(place: Place, volume: str, rows: int, yes: bool, as_json: bool) -> None:
    """Let the node that was overtaken follow, then take VOLUME over again as planned: what it still held is kept and listed first."""
    from mgmt.failover import failback as way_back
    from mgmt.failover import view
    from mgmt.terminal import Bars, show, show_json

    with place.site() as site, Bars() as bars:
        done = way_back.failback(site, volume, agree=_agreement(yes), tell=bars.tell)
    if done is None:
        return
    followed, account = done
    if as_json:
        show_json({"followed": followed and view.followed_document(followed), "failover": view.account_document(account)})
        return
    show([*(view.followed_sheets(followed, rows) if followed else ()), *view.account_sheets(account)])


def _agreement(yes: bool) -> Agreement:
    def agree(entry: VolumeEntry, node: str) -> bool:
        want(
            yes,
            f"Keep what {node} holds of {entry.name} as a generation, and let it follow {entry.primary}?",
            f"this makes {node} hold what {entry.primary} has",
        )
        return True

    return agree
