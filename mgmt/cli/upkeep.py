"""What keeps a pair fit for the bad night: check, verify, restore, losses, support-bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent.contract.errors import CheckFailed, ReplicaDiffers, RestoreIncomplete
from agent.contract.messages import to_document
from mgmt.cli.place import Place, as_json_option, at_place, volume_argument, want, yes_option

if TYPE_CHECKING:
    from mgmt.run import Damage, Verified
    from mgmt.terminal import Sheet


@click.command()
@click.argument("volumes", nargs=-1, metavar="[VOLUME]...")
@click.option(
    "--oldest-hours", type=click.FloatRange(0, min_open=True), default=26.0, show_default=True, help="Age of a replica that is a warning."
)
@as_json_option
@at_place
def check(place: Place, volumes: tuple[str, ...], oldest_hours: float, as_json: bool) -> None:
    """List what must be right before the bad night: OK, WARNING or FAILED, each with a hint. Changes nothing.

    Exit status 0 without a FAILED, also with a WARNING.
    """
    from mgmt import run
    from mgmt.terminal import Sheet, say, show, show_json

    with place.site() as site:
        found = run.preflight(site, volumes, oldest_s=oldest_hours * 3600)
    state = run.worst(found)
    if as_json:
        show_json({"state": state.value, "findings": [to_document(finding) for finding in found]})
        click.get_current_context().exit(CheckFailed.exit_code if state is run.CheckState.FAILED else 0)
    rows = tuple((finding.state.value, finding.subject, finding.what, finding.said, finding.hint) for finding in found)
    show([Sheet(("", "of", "what", "found", "hint"), rows)])
    if state is run.CheckState.FAILED:
        failed = [f"{finding.subject}: {finding.what}" for finding in found if finding.state is state]
        raise CheckFailed(f"{len(failed)} of {len(found)} checks failed", cause="; ".join(failed))
    say(f"Nothing failed; {sum(finding.state is run.CheckState.WARNING for finding in found)} of {len(found)} checks warn.")


@click.command()
@volume_argument
@click.option("--generation", help="Which, by name; without it, the newest that both nodes hold.")
@click.option("--heal", is_flag=True, help="Bring damaged blocks from the copy that is right.")
@click.option("--trust", metavar="NODE", help="Whose copy is right where no digest table says it.")
@yes_option
@as_json_option
@at_place
def verify(place: Place, volume: str, generation: str | None, heal: bool, trust: str | None, yes: bool, as_json: bool) -> None:
    """Compare both nodes' copies of a generation of VOLUME block by block, and name the files whose blocks differ.

    Every block is read from the disks again; only digests travel. Operational volumes are not touched, also by --heal.
    """
    from mgmt import run
    from mgmt.terminal import Bars, say, show, show_json

    if heal:
        want(yes, f"Replace damaged blocks in generations of volume {volume}?")
    with place.site() as site, Bars(quiet=as_json) as bars:
        found = run.verify(site, volume, generation=generation, heal=heal, trust=trust, tell=bars.tell)
    if as_json:
        show_json({**to_document(found), "clean": found.clean})
        click.get_current_context().exit(0 if found.clean else ReplicaDiffers.exit_code)  # the document says it all: one is enough
    show(_sheets(found))
    if not found.clean:
        raise ReplicaDiffers(f"{found.generation.name} of volume {found.volume}: {_sentence(found)}", fix=_fix(found))
    say(f"{found.generation.name} is equal on both nodes, {found.blocks:,} blocks compared{_mended(found)}.")


@click.command()
@volume_argument
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--generation", required=True, help="From which, by name; `landfall status` shows the newest.")
@click.option("--to", "folder", metavar="DIR", help="Beneath this folder of the volume [.landfall-restored/GENERATION].")
@click.option("--in-place", is_flag=True, help="In place of what is there now.")
@click.option("--node", help="Which node; without it, the one that serves the volume.")
@yes_option
@as_json_option
@at_place
def restore(
    place: Place,
    volume: str,
    paths: tuple[str, ...],
    generation: str,
    folder: str | None,
    in_place: bool,
    node: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Bring files back from a generation of VOLUME, directories with all below them, while clients use the volume.

    PATHs are relative to the volume's root. Each file is replaced in one step.
    """
    from mgmt import run
    from mgmt.terminal import Sheet, say, show, show_json
    from mgmt.view import bytes_words

    if in_place and folder is not None:
        raise click.UsageError("--to and --in-place exclude each other")
    beneath = "" if in_place else folder or f".landfall-restored/{generation}"
    if in_place:
        want(yes, f"Replace {', '.join(paths)} of volume {volume} by what {generation} has?")
    with place.site() as site:
        done = run.restore(site, volume, generation, paths, folder=beneath, node=node)
    if as_json:
        show_json({**to_document(done), "folder": beneath})
        click.get_current_context().exit(RestoreIncomplete.exit_code if done.refused else 0)
    where = f"beneath {beneath}" if beneath else "in place"
    say(f"{done.files:,} files ({bytes_words(done.bytes)}) of {generation} are restored {where}.")
    if done.refused:
        show([Sheet(("not restored", "because"), tuple((refused.path, refused.reason) for refused in done.refused))])
        raise RestoreIncomplete(f"{len(done.refused)} files of {generation} are not restored")


@click.command()
@volume_argument
@click.option("--under", default="", metavar="PATH", help="Only what is at PATH or below it.")
@click.option("--all", "everything", is_flag=True, help="Also files that were recovered.")
@as_json_option
@at_place
def losses(place: Place, volume: str, under: str, everything: bool, as_json: bool) -> None:
    """Search the kept loss statements of VOLUME, also of one that was removed: what became of which file, when, and who ordered it."""
    from mgmt.losses import losses as search
    from mgmt.terminal import Sheet, say, show, show_json
    from mgmt.view import WORDS, bytes_words, moment, path_of, span

    with place.site() as site:
        statements = [(entry.statement, entry.undone_ns is not None) for entry in site.catalog.statements(volume)]
    found = search(statements, under, with_recovered=everything)
    if as_json:
        show_json([to_document(loss) for loss in found])
        return
    rows = tuple(
        (
            moment(loss.at_ns) + (" (undone)" if loss.undone else ""),
            WORDS[loss.account.outcome],
            bytes_words(loss.account.size_bytes),
            "-" if loss.change_age_s is None else span(loss.change_age_s),
            path_of(loss.account),
            loss.account.reason,
            loss.operator,
        )
        for loss in found
    )
    if rows:
        show([Sheet(("salvage", "verdict", "size", "lost change was made before", "file", "why", "by"), rows)])
    say(f"{len(rows):,} files, in {len({loss.transfer for loss in found})} of {len(statements)} salvages.")


@click.command("support-bundle")
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), default="landfall-support.tar.gz", show_default=True, help="File."
)
@click.option("--names", is_flag=True, help="With the names of users' files.")
@as_json_option
@at_place
def support_bundle(place: Place, output: Path, names: bool, as_json: bool) -> None:
    """Pack what somebody who helps must know, without secrets: configuration, check, standing, history, what the agents say.

    Names of users' files are left out unless asked for.
    """
    from mgmt.bundle import collected, write_bundle
    from mgmt.terminal import say, show_json
    from mgmt.view import bytes_words

    with place.site() as site:
        parts = collected(site, with_names=names)
    size = write_bundle(output, parts)
    if as_json:
        show_json({"path": str(output), "bytes": size, "parts": [{"name": part.name, "bytes": len(part.content)} for part in parts]})
    else:
        say(f"{output} ({bytes_words(size)}) holds {', '.join(part.name for part in parts)}.")


def _sheets(found: Verified) -> list[Sheet]:
    """Return the damage as tables: what of it, then the files."""
    from mgmt.terminal import Sheet

    rows, files = [], []
    for damage in found.damage:
        owners, node = damage.owners, damage.node or "not known"
        kinds = {"metadata": owners.metadata_blocks, "journal": owners.journal_blocks, "free": owners.free_blocks}
        other = ", ".join(f"{count:,} {kind}" for kind, count in {**kinds, "without a name": owners.nameless_blocks}.items() if count)
        state = "mended" if damage.mended else "damaged"
        rows.append((node, state, f"{damage.blocks:,}", f"{len(owners.files):,}", other or "-"))
        files += [(node, f"{file.blocks:,}", path) for file in owners.files for path in file.paths]
    sheets = []
    if rows:
        sheets.append(Sheet(("wrong on", "", "blocks", "files", "blocks of no file"), tuple(rows)))
    if files:
        sheets.append(Sheet(("wrong on", "blocks", "file"), tuple(files)))
    if found.written:
        sheets.append(Sheet(("somebody wrote to the copy on", "because"), found.written))
    if found.doubted:
        places = tuple((str(first), str(count)) for first, count in found.doubted)
        sheets.append(Sheet(("equal on both nodes, other than recorded: first block", "blocks"), places))
    return sheets


def _sentence(found: Verified) -> str:
    left = [damage for damage in found.damage if not damage.mended]
    parts = [
        f"{sum(damage.blocks for damage in left if damage.node == node):,} blocks are wrong on {node}" for node in _nodes(left) if node
    ]
    if unknown := sum(damage.blocks for damage in left if not damage.node):
        parts.append(f"{unknown:,} blocks differ, and nothing says whose are right")
    if found.doubted:
        parts.append(f"{sum(count for _, count in found.doubted):,} blocks are equal on both nodes and not what the digest table says")
    return "; ".join(parts)


def _fix(found: Verified) -> str:
    left = [damage for damage in found.damage if not damage.mended]
    if any(not damage.node for damage in left):
        return f"Find out whose copy is right; then `landfall verify {found.volume} --heal --trust NODE`."
    if left:
        return f"`landfall verify {found.volume} --heal` mends it; then look at the disks of {', '.join(_nodes(left))}."
    return "Both disks, or the table, may be wrong: compare the files with a backup, and replicate in full."


def _nodes(damage: list[Damage]) -> list[str]:
    return sorted({found.node for found in damage})


def _mended(found: Verified) -> str:
    mended = sum(damage.blocks for damage in found.damage if damage.mended)
    return f", {mended:,} of them mended" if mended else ""
