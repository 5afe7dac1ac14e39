"""``lab``: a node of the local lab loses its power, and its first process is gone."""

from __future__ import annotations

from pathlib import Path

from mgmt.fencing.protocol import FenceCode, FenceRequest, NotFencedError, serve
from mgmt.lab import lifecycle, processes
from mgmt.lab.layout import NAS_NODES, Lab


def fence(request: FenceRequest) -> str:
    """Return that the node does not run; LabMissing, which is no proof, where the directory is no lab."""
    if not request.options.directory:
        raise NotFencedError(FenceCode.REFUSED, "fence_options.directory does not say where the lab is")
    lab = Lab.at(Path(request.options.directory))
    node = next((node for node in NAS_NODES if node == request.node), None)
    if node is None:
        raise NotFencedError(FenceCode.REFUSED, f"a lab has no NAS node {request.node}")
    lifecycle.kill(lab, node)
    if processes.first_process(lab, node) is not None:
        raise NotFencedError(FenceCode.ALIVE, f"{node} runs")
    return f"{node} of the lab has no power: its first process is gone"


if __name__ == "__main__":
    serve(fence)
