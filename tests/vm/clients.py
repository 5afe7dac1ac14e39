"""What an SMB client on the management node finds: another machine than those that serve."""

from __future__ import annotations

from collections.abc import Iterable

from testinfra.host import Host

from tests.vm.run import ADDRESS, Run

SAMPLE = 8


def shares(client: Host, address: str) -> list[str]:
    """Return what a node says it shares; patiently, as an emulated one takes its time to start what answers this."""
    rows = [line.split("|") for line in client.run(f"smbclient -N -g -t 180 -L //{address}").stdout.splitlines()]
    return [row[1] for row in rows if row[0] == "Disk"]


def by_smb(client: Host, run: Run, path: str) -> str:
    """Return the sha256 of a file that is read at the volume's address."""
    backslashes = path.replace("/", "\\")
    read = client.check_output("smbclient -N %s -c %s | sha256sum", f"//{ADDRESS}/{run.name}", f'get "{backslashes}" -')
    return str(read.split()[0])


def sample(run: Run, paths: Iterable[str]) -> list[str]:
    """Return some of the regular files of the target among ``paths`` whose names smbclient's own language does not change."""
    plain = sorted(
        path
        for path in paths
        if "sha256" in run.target[path] and path.isascii() and path.replace("/", "").replace("-", "").replace(".", "").isalnum()
    )
    assert plain
    return plain[:: max(1, len(plain) // SAMPLE)]
