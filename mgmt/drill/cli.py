"""`landfall drill`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from rich.console import Console

from agent.contract.errors import DrillFailed
from agent.contract.identity import FilesystemKind
from agent.contract.messages import Differential
from mgmt.drill.options import Kill, Options
from mgmt.sizes import Size

PIPE_WIDTH = 120


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
@click.option("--fs", "filesystem", type=click.Choice([kind.value for kind in FilesystemKind]), default="ext4", show_default=True)
@click.option("--at", type=_Share(), default=0.5, show_default=True, help="Kill after this share of the transfer's bytes.")
@click.option("--kill", type=click.Choice([kind.value for kind in Kill]), default="agent", show_default=True, help="What dies.")
@click.option("--differential", type=click.Choice([mode.value for mode in Differential]), default="send", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True)
@click.option("--files", type=click.IntRange(min=100), default=20_000, show_default=True)
@click.option("--size", type=Size(), default="2G", show_default=True, help="Size of the volume.")
@click.option("--changes", type=click.IntRange(min=10), default=2_000, show_default=True, help="Files to change.")
@click.option("--rate", type=Size(), default="0", help="Limit of the interrupted transfer in bytes per second, such as 20M; 0: none.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("build/drill"), show_default=True)
@click.option("--keep-lab", is_flag=True, help="Leave the lab up, to look around.")
@click.option("--json", "as_json", is_flag=True, help="Print report.json on standard output.")
def drill(
    filesystem: str,
    at: float,
    kill: str,
    differential: str,
    seed: int,
    files: int,
    size: int,
    changes: int,
    rate: int,
    out: Path,
    keep_lab: bool,
    as_json: bool,
) -> None:
    """Replicate a volume of real files, kill the source in the middle, recover, and have the result checked."""
    from mgmt.drill.report import document, sentence
    from mgmt.drill.scenario import Drill
    from mgmt.drill.stage import Stage
    from mgmt.view import table

    options = Options(
        FilesystemKind(filesystem), at, Kill(kill), Differential(differential), seed, files, size, changes, rate, out, keep_lab
    )
    course = Drill(options, Stage(Console(stderr=True))).run()
    report = document(options, course)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    if as_json:
        click.echo(json.dumps(report))
    else:
        if course.statement is not None:
            page = Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH)
            page.print(table(course.statement, rows=12))
        click.echo(sentence(options, course))
        click.echo(f"report: {out / 'report.json'}" + (f", {out / 'report.html'}" if course.statement is not None else ""))
    if course.findings is not None and not course.findings.clean:
        raise DrillFailed("the checker found faults", cause="; ".join(course.findings.first[:5]))
