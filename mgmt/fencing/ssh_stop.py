"""``ssh-stop``: the node's agent is asked to stop serving. For labs: it proves what holds until somebody asks it to serve again."""

from __future__ import annotations

from pathlib import Path

from agent.contract.errors import ConfigInvalid, HostKeyChanged, LandfallError, NodeUnreachable
from agent.contract.messages import StopServing
from mgmt.fencing.protocol import FenceCode, FenceRequest, NotFencedError, serve
from mgmt.inventory import NodeEntry
from mgmt.reach import ssh_node

ANSWER_LIMIT_S = 60.0


def fence(request: FenceRequest) -> str:
    """Return the agent's word that it serves the volume no more."""
    options = request.options
    if options.pausable:
        words = f"{request.node} can be paused: its word proves nothing. Fence it by `libvirt` or `command`"
        raise NotFencedError(FenceCode.REFUSED, words)
    entry = NodeEntry(request.node, options.address, Path(options.ssh_key), options.host_key, options.ssh_port, options.ssh_user)
    node = ssh_node(entry, answer_limit_s=ANSWER_LIMIT_S, term=options.term)
    try:
        facts = node.ask(StopServing(request.volume))
    except (NodeUnreachable, HostKeyChanged) as error:
        raise NotFencedError(FenceCode.UNTOLD, error.message) from error
    except ConfigInvalid as error:
        raise NotFencedError(FenceCode.REFUSED, error.message) from error
    except LandfallError as error:
        raise NotFencedError(FenceCode.ALIVE, error.message) from error
    finally:
        node.close()
    if facts.serving:
        raise NotFencedError(FenceCode.ALIVE, f"{request.node} still serves the volume")
    return f"{request.node} says that it stopped serving; an SSH-only stop, for labs"


if __name__ == "__main__":
    serve(fence)
