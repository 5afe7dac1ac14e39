"""The fences there are."""

from __future__ import annotations

from enum import StrEnum


class FenceKind(StrEnum):
    """The fences that a node's entry can name."""

    MANUAL = "manual"
    COMMAND = "command"  # the operator's own program
    LIBVIRT = "libvirt"
    LAB = "lab"
    LEASE = "lease"
    SSH_STOP = "ssh-stop"
