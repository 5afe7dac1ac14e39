"""`landfall drill`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from agent.contract.errors import DrillFailed, LandfallError
from agent.contract.identity import FilesystemKind
from agent.contract.messages import Differential
from agent.system.clock import wall_ns
from mgmt.cli.place import Place, at_place
from mgmt.drill.options import MIB, LabKind, Options
from mgmt.lab.layout import LabSubstrate
from mgmt.sizes import Size

if TYPE_CHECKING:
    from mgmt.drill.course import Course
    from mgmt.drill.scenario import Scenario
    from mgmt.drill.stage import Stage
    from mgmt.proofs import Proof

PIPE_WIDTH = 120
VM_SUBSTRATES = ("lvm-thin", "lvm-snapshot", "reflink")
KILLS = {"agent": "source-killed", "node": "source-lost", "link": "link-cut", "receiver": "receiver-killed", "power": "receiver-lost"}
"""Scenarios that a word for what dies is enough for."""


class _Share(click.ParamType[float]):
    """A share above 0 and below 1."""

    name = "share"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the share, or refuse."""
        try:
            share = float(str(value))
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            self.fail(f"{value!r} is not a share such as 0.5", param, ctx)
        return share


@click.command()
@click.option("--lab", type=click.Choice([kind.value for kind in LabKind]), default="local", show_default=True, help="Where it is held.")
@click.option(
    "--substrate", type=click.Choice(VM_SUBSTRATES),
    help="What volumes are kept on; the local lab's lvm-* take a kernel with device-mapper. [default: reflink; what the VM lab has]",
)  # fmt: skip
@click.option("--fs", "filesystem", type=click.Choice([kind.value for kind in FilesystemKind]), default="ext4", show_default=True)
@click.option("--scenario", "name", help="What goes wrong; --list shows all. [default: source-killed; in the VM lab, source-lost]")
@click.option("--kill", type=click.Choice(list(KILLS)), help="What dies, in place of --scenario.")
@click.option("--list", "listed", is_flag=True, help="List the scenarios, and hold none.")
@click.option("--history", is_flag=True, help="Show what drills and rehearsals (`landfall failover --test`) ended in, and hold none.")
@click.option("--at", type=_Share(), help="Break the transfer off after this share of its bytes. [default: as the scenario says]")
@click.option("--differential", type=click.Choice([mode.value for mode in Differential]), default="send", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True)
@click.option("--files", type=click.IntRange(min=100), help="Files to begin with. [default: 20000; in the VM lab, 1500]")
@click.option("--size", type=Size(), help="Size of the volume. [default: 2G; in the VM lab, 256M, or 320M for XFS]")
@click.option("--changes", type=click.IntRange(min=10), help="Files to change. [default: 2000; in the VM lab, 300]")
@click.option("--rate", type=Size(), help="Limit of the interrupted transfer in bytes per second; 0: none. [default: 0; in the VM lab, 1M]")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="[default: build/drill; build/vm/runs/TIME]")
@click.option("--keep-lab", is_flag=True, help="Leave the local lab up, to look around. The VM lab always stays.")
@click.option("--json", "as_json", is_flag=True, help="Print report.json on standard output.")
@at_place
def drill(
    place: Place,
    lab: str,
    substrate: str | None,
    filesystem: str,
    name: str | None,
    kill: str | None,
    listed: bool,
    history: bool,
    at: float | None,
    differential: str,
    seed: int,
    files: int | None,
    size: int | None,
    changes: int | None,
    rate: int | None,
    out: Path | None,
    keep_lab: bool,
    as_json: bool,
) -> None:
    """Replicate a volume of real files, let something go wrong in the middle, recover, and have the result checked."""
    from mgmt.drill import scenario as scenarios
    from mgmt.drill.report import sentence
    from mgmt.drill.scenario import Verdict
    from mgmt.proofs import Proof

    if history:
        _show_history(place, as_json)
        return
    on_machines, xfs = LabKind(lab) is LabKind.VM, FilesystemKind(filesystem) is FilesystemKind.XFS
    if not on_machines and substrate and substrate not in set(LabSubstrate):
        raise click.UsageError(f"the local lab cannot have the substrate {substrate}")
    if listed:
        _list(as_json)
        return
    if name and kill:
        raise click.UsageError("--kill and --scenario both say what goes wrong; use one of them")
    scenario = scenarios.read(KILLS[kill] if kill else name or ("source-lost" if on_machines else "source-killed"))
    if LabKind(lab) not in scenario.labs:
        raise click.UsageError(f"scenario {scenario.name} is for the lab {' or '.join(scenario.labs)}")
    if at is not None:
        scenario = scenario.at(at)
    usual = (20_000, 2048 * MIB, 2_000, 0) if not on_machines else (1_500, (320 if xfs else 256) * MIB, 300, MIB)
    given = (files, size, changes, rate)
    file_count, size_bytes, change_count, rate_bytes_s = (
        default if value is None else value for value, default in zip(given, usual, strict=True)
    )
    options = Options(
        FilesystemKind(filesystem),
        scenario.share,
        scenario.name,
        Differential(differential),
        seed,
        file_count,
        size_bytes,
        change_count,
        rate_bytes_s,
        out or Path("build/drill"),
        keep_lab,
        LabKind(lab),
        substrate or ("" if on_machines else "reflink"),
    )
    begun_ns = wall_ns()
    try:
        options, course = _hold(options, scenario, out)
        report = _tell(options, course, as_json)
    except LandfallError as error:
        keep(place, Proof(begun_ns, scenario.name, "", Verdict.FAILED, False, None, None, "", str(error)))
        raise
    words, path = "; ".join(course.shortfalls) or sentence(course), str((options.folder / "report.json").resolve())
    figures = report["verdict"], not course.shortfalls, report["rpo_s"], report["rto_s"]
    keep(place, Proof(begun_ns, scenario.name, "", *figures, path, words))
    if course.shortfalls:
        unclean = course.findings is not None and not course.findings.clean
        what = "the checker found faults" if unclean else f"scenario {scenario.name} did not end as it must"
        raise DrillFailed(what, cause="; ".join(course.shortfalls))


def _hold(options: Options, scenario: Scenario, out: Path | None) -> tuple[Options, Course]:
    from mgmt.drill import judgement
    from mgmt.drill.stage import Stage

    stage = Stage(Console(stderr=True))
    if options.lab is LabKind.VM:
        options, course = _on_machines(options, scenario, out, stage)
    else:
        from mgmt.drill.local import Drill

        course = Drill(options, scenario, stage).run()
    course.shortfalls = judgement.shortfalls(course, scenario.expect, options.lab.patience)
    return options, course


def _tell(options: Options, course: Course, as_json: bool) -> dict[str, Any]:
    """Write report.json and return it; print it, or what a person wants to know of it."""
    from mgmt.drill.report import document, sentence
    from mgmt.view import table

    folder = options.folder
    report = document(options, course)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    if as_json:
        click.echo(json.dumps(report))
        return report
    if course.statement is not None:
        page = Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH)
        page.print(table(course.statement, rows=12))
    click.echo(sentence(course))
    click.echo(f"report: {folder / 'report.json'}" + (f", {folder / 'report.html'}" if course.statement is not None else ""))
    return report


def _kept_in(place: Place) -> Path:
    """Return where proofs are kept: with what the management node remembers; on a machine that is none, beside the drills."""
    return place.inventory().state_dir if place.path.exists() else Path("build")


def keep(place: Place, proof: Proof) -> None:
    """Add the drill to the history. That it cannot be kept there is said, and changes nothing of what the drill ended in."""
    from mgmt import proofs

    try:
        proofs.keep(_kept_in(place), proof)
    except OSError as error:
        click.echo(f"landfall: the drill is not in the history: {error}", err=True)


def _show_history(place: Place, as_json: bool) -> None:
    from agent.contract.messages import to_document
    from mgmt import proofs
    from mgmt.terminal import show, show_json

    kept = proofs.kept(_kept_in(place))
    if as_json:
        show_json([to_document(proof) for proof in kept])
    elif kept:
        show([proofs.sheet(kept)])
    else:
        click.echo("No drill or rehearsal has been held yet.", err=True)


def _list(as_json: bool) -> None:
    """Print every scenario with what it is about."""
    from agent.contract.messages import to_document
    from mgmt.drill import scenario as scenarios
    from mgmt.terminal import Sheet, show, show_json

    found = [scenarios.read(name) for name in scenarios.names()]
    if as_json:
        show_json([{"name": one.name, "says": one.says, "labs": list(one.labs), "expect": to_document(one.expect)} for one in found])
    else:
        show([Sheet(("scenario", "labs", "what happens"), tuple((one.name, ", ".join(one.labs), one.says) for one in found))])


def _on_machines(options: Options, scenario: Scenario, out: Path | None, stage: Stage) -> tuple[Options, Course]:
    """Hold the drill in the VM lab that is up. Returns the options with the folder of this run, which is its own unless it was named."""
    from mgmt.drill.vm import host
    from mgmt.drill.vm.scenario import Drill

    host.go_inside()
    options = replace(options, folder=out or host.new_run())
    drilled = Drill(options, scenario, stage, host.machines(), host.player(options.folder))
    course = drilled.run()
    return drilled.options, course
