"""`landfall drill`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from agent.contract.errors import DrillFailed
from agent.contract.identity import FilesystemKind
from agent.contract.messages import Differential
from mgmt.drill.options import MIB, LabKind, Options
from mgmt.lab.layout import LabSubstrate
from mgmt.sizes import Size

if TYPE_CHECKING:
    from mgmt.drill.course import Course
    from mgmt.drill.stage import Stage

PIPE_WIDTH = 120
VM_SUBSTRATES = ("lvm-thin", "lvm-snapshot", "reflink")


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
@click.option("--list", "listed", is_flag=True, help="List the scenarios, and hold none.")
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
def drill(
    lab: str,
    substrate: str | None,
    filesystem: str,
    name: str | None,
    listed: bool,
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
    from mgmt.drill.report import document, sentence
    from mgmt.drill.stage import Stage
    from mgmt.view import table

    on_machines, xfs = LabKind(lab) is LabKind.VM, FilesystemKind(filesystem) is FilesystemKind.XFS
    if not on_machines and substrate and substrate not in set(LabSubstrate):
        raise click.UsageError(f"the local lab cannot have the substrate {substrate}")
    if listed:
        _list(as_json)
        return
    scenario = scenarios.read(name or ("source-lost" if on_machines else "source-killed"))
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
    stage = Stage(Console(stderr=True))
    if on_machines:
        options, course = _on_machines(options, out, stage)
    else:
        from mgmt.drill.local import Drill

        course = Drill(options, scenario, stage).run()
    folder = options.folder
    report = document(options, course)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    if as_json:
        click.echo(json.dumps(report))
    else:
        if course.statement is not None:
            page = Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH)
            page.print(table(course.statement, rows=12))
        click.echo(sentence(options, course))
        click.echo(f"report: {folder / 'report.json'}" + (f", {folder / 'report.html'}" if course.statement is not None else ""))
    if course.findings is not None and not course.findings.clean:
        raise DrillFailed("the checker found faults", cause="; ".join(course.findings.first[:5]))
    if course.shortfalls:
        raise DrillFailed(f"scenario {scenario.name} did not end as it must", cause="; ".join(course.shortfalls))


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


def _on_machines(options: Options, out: Path | None, stage: Stage) -> tuple[Options, Course]:
    """Hold the drill in the VM lab that is up. Returns the options with the folder of this run, which is its own unless it was named."""
    from mgmt.drill.vm import host
    from mgmt.drill.vm.scenario import Drill

    host.go_inside()
    options = replace(options, folder=out or host.new_run())
    drilled = Drill(options, stage, host.machines(), host.player(options.folder))
    course = drilled.run()
    return drilled.options, course
