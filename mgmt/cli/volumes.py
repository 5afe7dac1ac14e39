"""`landfall volume`: volumes and what is laid down for them."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import click

from agent.contract.identity import FilesystemKind, plain_name
from agent.contract.messages import Appraised, Deletions, to_document
from mgmt.cli.place import Place, as_json_option, at_place, volume_argument, want, want_name, yes_option
from mgmt.sizes import Size

if TYPE_CHECKING:
    from mgmt.determination import AtomicSet

LEVEL_DIGITS: Final = 9


@click.group()
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
        click.option("--address", help="Where clients find it, on whichever node serves it: such as 192.0.2.100/24; '' for none."),
        click.option("--schedule", metavar="CALENDAR", help="When `landfall watch` replicates it, as in a systemd timer; '' for never."),
        click.option(
            "--together",
            metavar="NAME",
            help="`landfall watch` replicates volumes of one NAME (and primary) together, when one of them is due; '' for by itself.",
        ),
        click.option("--keep", metavar="RULE", help="Generations to keep, such as last=16,hourly=24,daily=7; '' for the configuration's."),
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
    address: str | None,
    schedule: str | None,
    together: str | None,
    keep: str | None,
    as_json: bool,
) -> None:
    """Make volume NAME on the primary and get the secondary ready for its replica."""
    from mgmt import run
    from mgmt.determination import Policy
    from mgmt.terminal import say, show_json

    levels, sets, timing = _levels(priorities), _sets(atomic), _timing(schedule, together, keep)
    with place.site() as site:
        primary, secondary = _nodes(site.inventory.names, primary, secondary)
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
            address=place_on_net(address),
        )
        run.set_volume(site, name, **timing)
    if as_json:
        show_json(to_document(facts))
    else:
        say(f"Volume {name} is served by {primary} at {facts.mount_point}.")


@volume.command("adopt")
@click.argument("name")
@click.argument("source")
@click.option("--primary", help="The node that has it, and serves it; without it, the first of two.")
@click.option("--secondary", help="The node that holds its replica; without it, the second of two.")
@rules
@yes_option
@as_json_option
@at_place
def volume_adopt(
    place: Place,
    name: str,
    source: str,
    primary: str | None,
    secondary: str | None,
    deletions: str | None,
    priorities: tuple[str, ...],
    atomic: tuple[str, ...],
    address: str | None,
    schedule: str | None,
    together: str | None,
    keep: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Make the ext4 or XFS on SOURCE, with all that it holds, volume NAME of the primary, without copying it.

    SOURCE is what the primary has it on: the absolute path of an image file on the filesystem of its pool (which is moved into the pool),
    or the name of a logical volume in its volume group: a thin one of the pool for lvm-thin, a plain one without snapshots for
    lvm-snapshot. It must not be mounted or attached anywhere, and must have been unmounted cleanly. The first replicate sends all of it.
    """
    from mgmt import run
    from mgmt.determination import Policy
    from mgmt.terminal import say, show_json
    from mgmt.view import bytes_words

    levels, sets, timing = _levels(priorities), _sets(atomic), _timing(schedule, together, keep)

    with place.site() as site:
        one, other = _nodes(site.inventory.names, primary, secondary)

        def agree(found: Appraised) -> bool:
            what = f"the {found.filesystem} of {bytes_words(found.size_bytes)} on {one}'s {source}"
            want(yes, f"Make {what} volume {name}? It is Landfall's from then on.", "this takes over what you name")
            return True

        facts = run.adopt_volume(
            site,
            name,
            source,
            primary=one,
            secondary=other,
            policy=Policy(Deletions(deletions or Deletions.HOLD), sets),
            priorities=levels,
            address=place_on_net(address),
            agree=agree,
        )
        if facts is None:
            return
        run.set_volume(site, name, **timing)
    if as_json:
        show_json(to_document(facts))
    else:
        say(f"Volume {name} is served by {one} at {facts.mount_point}; `landfall replicate {name}` sends it to {other}.")


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
            entry.address or "-",
            entry.schedule or "-",
            entry.together or "-",
            str(entry.keep) or "-",
        )
        for entry in entries
    )
    columns = (
        "volume",
        "filesystem",
        "size",
        "primary",
        "secondary",
        "deletions",
        "priorities",
        "atomic sets",
        "address",
        "schedule",
        "together",
        "keeps",
    )
    show([Sheet(columns, rows)])


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
    address: str | None,
    schedule: str | None,
    together: str | None,
    keep: str | None,
    no_priorities: bool,
    no_atomic: bool,
    as_json: bool,
) -> None:
    """Lay down policy for VOLUME; what is not given stays."""
    from mgmt import run
    from mgmt.determination import Policy
    from mgmt.terminal import say, show_json

    levels, sets, timing = _levels(priorities), _sets(atomic), _timing(schedule, together, keep)
    with place.site() as site:
        entry = site.catalog.volume(volume)
        kept = {found.name: found for found in (() if no_atomic else entry.policy.atomic_sets)} | {found.name: found for found in sets}
        wanted = dict(() if no_priorities else entry.priorities) | dict(levels)
        policy = Policy(Deletions(deletions) if deletions else entry.policy.deletions, tuple(kept.values()))
        if address is not None:
            run.move_address(site, volume, place_on_net(address))
        entry = run.set_volume(site, volume, policy=policy, priorities=tuple(wanted.items()), **timing)
    if as_json:
        show_json(to_document(entry))
    else:
        say(f"Volume {entry.name} has its policy.")


@volume.command("grow")
@volume_argument
@click.option("--size", type=Size(), required=True, help="What it is to have then, such as 4T.")
@as_json_option
@at_place
def volume_grow(place: Place, volume: str, size: int, as_json: bool) -> None:
    """Make VOLUME larger on both nodes, and its filesystem, while clients use it. The next replicate goes on from the same base.

    On lvm-snapshot it is not served meanwhile: `landfall unserve`, grow, `landfall serve`.
    """
    from mgmt import run
    from mgmt.terminal import say, show_json
    from mgmt.view import bytes_words

    with place.site() as site:
        facts = run.grow_volume(site, volume, size)
    show_json(to_document(facts)) if as_json else say(f"Volume {facts.name} has {bytes_words(facts.size_bytes)} now.")


@volume.command("remove")
@volume_argument
@click.option("--without", metavar="NODE", help="Do not ask this node, which is gone for good; what it holds stays there.")
@yes_option
@as_json_option
@at_place
def volume_remove(place: Place, volume: str, without: str | None, yes: bool, as_json: bool) -> None:
    """Destroy VOLUME on both nodes with all its generations. Its loss statements stay."""
    from mgmt import run
    from mgmt.terminal import say, show_json

    with place.site() as site:
        entry = site.catalog.volume(volume)
        if without not in {None, entry.primary, entry.secondary}:
            raise click.BadParameter(f"{without} is not a node of volume {volume}", param_hint="--without")
        want_name(yes, entry.name, f"This destroys volume {entry.name} and every generation of it")
        run.remove_volume(site, volume, without=without)
    show_json({"removed": entry.name, "id": str(entry.id)}) if as_json else say(f"Volume {entry.name} is gone.")


def place_on_net(address: str | None) -> str:
    """Return an address with the length of its network, as it is written everywhere; empty for none."""
    if not address:
        return ""
    try:
        found = ipaddress.ip_interface(address)
    except ValueError as error:
        raise click.BadParameter(f"{error}", param_hint="--address") from error
    if "/" not in address or found.network.num_addresses == 1 or found.ip in (found.network.network_address, found.network[-1]):
        raise click.BadParameter(f"{address!r} is no address of a network, such as 192.0.2.100/24", param_hint="--address")
    return str(found)


def _nodes(names: tuple[str, ...], primary: str | None, secondary: str | None) -> tuple[str, str]:
    """Return the two nodes of a volume, where they are not named those that there are."""
    if (primary is None or secondary is None) and len(names) != 2:
        raise click.UsageError("name --primary and --secondary: there are not exactly two nodes")
    one = primary or next(node for node in names if node != secondary)
    other = secondary or next(node for node in names if node != one)
    if one == other:
        raise click.UsageError(f"a volume needs two nodes; {one} is both its primary and its secondary")
    return one, other


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


def _timing(schedule: str | None, together: str | None, keep: str | None) -> dict[str, Any]:
    """Return what was said of when, with what, and retention, proved."""
    from agent.system.clock import wall_ns
    from mgmt.keep import Keep
    from mgmt.watch.schedule import next_due_ns

    timing: dict[str, Any] = {}
    if schedule is not None:
        if schedule and next_due_ns(schedule, wall_ns() // 10**9) is None:
            raise click.BadParameter(f"{schedule!r} never comes again", param_hint="--schedule")
        timing["schedule"] = schedule
    if together is not None:
        timing["together"] = plain_name(together) if together else ""
    if keep is not None:
        timing["keep"] = Keep.parse(keep)
    return timing
