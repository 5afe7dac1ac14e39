"""``libvirt``: the virtual machine is destroyed by its hypervisor, which then says that it does not run.

virsh(1): ``destroy`` ends the domain at once, without its consent; ``domstate`` says `shut off` when it is.
"""

from __future__ import annotations

from agent.contract.errors import CommandFailed
from agent.system.run import Output, run
from mgmt.fencing.protocol import FenceCode, FenceRequest, NotFencedError, serve

STEP_LIMIT_S = 30.0
OFF = frozenset({"shut off", "crashed"})


def fence(request: FenceRequest) -> str:
    """Return the hypervisor's word that the domain is off, destroyed just now or before."""
    domain, uri = request.options.domain or request.node, request.options.uri
    if domain.startswith("-"):
        raise NotFencedError(FenceCode.REFUSED, f"{domain!r} names no domain")
    _virsh(uri, "destroy", domain)  # one that is off already is refused; what counts is what it is now
    state = _virsh(uri, "domstate", domain)
    words = (state.stdout + state.stderr).decode("utf-8", "replace").strip()
    if state.status == 0 and words in OFF:
        return f"the hypervisor says that domain {domain} is {words}"
    if state.status == 0:
        raise NotFencedError(FenceCode.ALIVE, f"domain {domain} is {words}")
    unknown = "failed to get domain" in words
    raise NotFencedError(FenceCode.REFUSED if unknown else FenceCode.DEVICE_SILENT, words)


def _virsh(uri: str, verb: str, domain: str) -> Output:
    connect = ("--connect", uri) if uri else ()
    try:
        return run(["virsh", *connect, verb, domain], timeout_s=STEP_LIMIT_S, ok=range(256))
    except CommandFailed as error:
        raise NotFencedError(FenceCode.DEVICE_SILENT, error.message) from error


if __name__ == "__main__":
    serve(fence)
