"""``landfall-agent``: the daemon, the bridge that SSH runs, and looking into a DMI or an arrival record."""

from __future__ import annotations

import json
import logging
import os
import selectors
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from agent.contract.errors import DmiMalformed, LandfallError, NodeUnreachable, NotRoot, PathRefused

DEFAULT_CONFIG = Path("/etc/landfall/agent.toml")
DEFAULT_SOCKET = Path("/run/landfall/agent.sock")
STDIN, STDOUT = 0, 1


class _Group(click.Group):
    """Prints a LandfallError once, as its sentence, and ends with its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LandfallError as error:
            _end(ctx, error)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise  # click ends quietly when whoever read our output went away
            where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
            _end(ctx, PathRefused(f"{where}{error.strerror or error}"))


def _end(ctx: click.Context, error: LandfallError) -> NoReturn:
    click.echo(f"landfall-agent: {error}", err=True)
    ctx.exit(error.exit_code)


@click.group(cls=_Group)
@click.version_option(package_name="landfall")
def main() -> None:
    """Landfall's agent on a NAS node."""


@main.command()
@click.option("--config", "path", type=click.Path(path_type=Path), default=DEFAULT_CONFIG, show_default=True)
def daemon(path: Path) -> None:
    """Run the agent in the foreground."""
    from agent.config import read_config
    from agent.daemon import serve

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    config = read_config(path)
    if os.geteuid() != 0:
        raise NotRoot("the agent attaches devices and mounts filesystems")
    serve(config)


@main.command("check-config")
@click.option("--config", "path", type=click.Path(path_type=Path), default=DEFAULT_CONFIG, show_default=True)
def check_config(path: Path) -> None:
    """Say whether a configuration file is right; exit status 20 if it is not."""
    from agent.config import read_config

    config = read_config(path)
    click.echo(f"{path}: good, node {config.node}")


@main.command()
@click.option("--socket", "path", type=click.Path(path_type=Path), default=DEFAULT_SOCKET, show_default=True)
def connect(path: Path) -> None:
    """Bridge standard input and output to the daemon's socket; what SSH runs as forced command."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as upstream:
        try:
            upstream.connect(str(path))
        except OSError as error:
            raise NodeUnreachable("the agent does not run on this node", cause=f"{path}: {error}") from error
        _bridge(upstream)


def _bridge(upstream: socket.socket) -> None:
    """Copy both ways until the daemon ends the conversation; the end of our input only ends its input."""
    with selectors.DefaultSelector() as selector:
        selector.register(upstream, selectors.EVENT_READ)
        selector.register(STDIN, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is upstream:
                    data = upstream.recv(1 << 20)
                    if not data:
                        return
                    view = memoryview(data)
                    while view:
                        view = view[os.write(STDOUT, view) :]
                else:
                    data = os.read(STDIN, 1 << 20)
                    if data:
                        upstream.sendall(data)
                    else:
                        selector.unregister(STDIN)
                        upstream.shutdown(socket.SHUT_WR)


@main.group()
def dmi() -> None:
    """Look into differential management information."""


@dmi.command("show")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: the head, then every file.")
def dmi_show(file: Path, as_json: bool) -> None:
    """Print a DMI for people, or as JSON; refuse one that is damaged."""
    import mmap

    from agent.contract.dmi import Dmi
    from agent.service.show import json_lines, text_lines

    with file.open("rb") as raw:
        if not os.fstat(raw.fileno()).st_size:
            raise DmiMalformed("the file is empty")
        dmi_of_file = Dmi.decode(memoryview(mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)))
    if as_json:
        for document in json_lines(dmi_of_file):
            click.echo(json.dumps(document))
    else:
        for line in text_lines(dmi_of_file):
            click.echo(line)


if __name__ == "__main__":
    main()
