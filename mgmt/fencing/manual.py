"""``manual``: a person goes and looks, switches the node off, and types its name, or said it beforehand (``--confirm-fenced``)."""

from __future__ import annotations

from mgmt.fencing.protocol import FenceCode, FenceRequest, NotFencedError, serve

TERMINAL = "/dev/tty"


def fence(request: FenceRequest) -> str:
    """Return the operator's word; the terminal is the device, since standard input is the request."""
    said = request.options.confirmed or _asked(request.node)
    if said != request.node:
        raise NotFencedError(FenceCode.UNTOLD, f"{said!r} was typed, not {request.node!r}")
    return f"an operator confirmed that {request.node} cannot write"


def _asked(node: str) -> str:
    try:
        with open(TERMINAL, "r+b", buffering=0) as terminal:
            terminal.write(f"Switch {node} off, or make sure otherwise that it cannot write. Then type its name: ".encode())
            line = bytearray()
            while not line.endswith(b"\n") and (more := terminal.read(1)):
                line += more
    except OSError as error:
        raise NotFencedError(FenceCode.DEVICE_SILENT, "there is no terminal to ask at; --confirm-fenced NODE says it beforehand") from error
    return line.decode("utf-8", "replace").strip()


if __name__ == "__main__":
    serve(fence)
