"""The errors Landfall raises: one class for each thing an operator can act on.

A class is its code, exit code, retry class and documentation; ``landfall explain CODE`` prints the docstring. Instances
carry the sentence for this occasion, its cause and its fix. Errors cross the control plane as ``to_wire`` documents and
come back as the same class.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class Retry(StrEnum):
    """What a caller may do about an error; the class of an error alone decides a retry."""

    NEVER = "never"
    RECONNECT = "reconnect"
    LATER = "later"
    OPERATOR = "operator"


class LandfallError(Exception):
    """Something went wrong that has no class of its own yet; please report it with the journal of the node."""

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 70
    retry: ClassVar[Retry] = Retry.OPERATOR
    fix: ClassVar[str] = "Look at the node's journal and report this."

    def __init__(self, message: str, *, cause: str = "", fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.cause = cause
        self.fix_now = fix or self.fix

    def __str__(self) -> str:
        because = f" Cause: {self.cause}." if self.cause else ""
        return f"[{self.code}] {self.message.rstrip('.')}.{because} Fix: {self.fix_now}"

    def to_wire(self) -> dict[str, str]:
        """Return the document that carries this error to another node."""
        return {"code": self.code, "message": self.message, "cause": self.cause, "fix": self.fix_now}

    @staticmethod
    def from_wire(document: dict[str, str]) -> LandfallError:
        """Return the error a peer raised; an unknown code (a newer peer) becomes the base class with the code in its message."""
        texts = {key: str(document.get(key, "")) for key in ("code", "message", "cause", "fix")}
        known = by_code().get(texts["code"])
        if known is None:
            return LandfallError(f"{texts['code']}: {texts['message']}", cause=texts["cause"], fix=texts["fix"])
        return known(texts["message"], cause=texts["cause"], fix=texts["fix"])


class ConfigInvalid(LandfallError):
    """A configuration file has an unknown key, a wrong type or a value out of range. Nothing was started."""

    code, exit_code, retry, fix = "config-invalid", 20, Retry.OPERATOR, "Correct the named key; `check-config` proves it."


class NotRoot(LandfallError):
    """The command touches devices, mounts or namespaces and must run as root."""

    code, exit_code, retry, fix = "not-root", 21, Retry.OPERATOR, "Run it as root (sudo)."


class ProgramMissing(LandfallError):
    """A program of the operating system that this step needs is not installed."""

    code, exit_code, retry, fix = "program-missing", 22, Retry.OPERATOR, "Install the named package; `make setup` does."


class CommandFailed(LandfallError):
    """A program of the operating system failed or ran past its time limit; argv, exit status and stderr are in the cause."""

    code, exit_code, retry, fix = "command-failed", 23, Retry.LATER, "Read the program's own words in the cause."


class DeviceFailed(LandfallError):
    """Reading or writing a block device failed; errno, path, offset and length are in the cause. Nothing was filled in for it."""

    code, exit_code, retry, fix = "device-failed", 24, Retry.OPERATOR, "Check the disk below the device (dmesg, smartctl)."


class DeviceBusy(LandfallError):
    """The device or image is mounted or open for writing by somebody else; it was not touched."""

    code, exit_code, retry, fix = "device-busy", 25, Retry.LATER, "Unmount it or stop what holds it (lsof, fuser)."


class NotOurs(LandfallError):
    """The device, image, namespace or folder does not carry Landfall's identity, so nothing was done to it."""

    code, exit_code, retry, fix = "not-ours", 26, Retry.OPERATOR, "Name the right one; Landfall never takes over what it did not make."


class LayoutUnsupported(LandfallError):
    """The filesystem has a layout Landfall does not replicate (external log, realtime, encryption, block size other than 4096 ...)."""

    code, exit_code, retry, fix = (
        "layout-unsupported",
        27,
        Retry.NEVER,
        "Use ext4 (extents) or XFS (v5) with 4096-byte blocks and internal log.",
    )


class NoSpace(LandfallError):
    """The pool or the filesystem has no room for this step; what was there before is intact."""

    code, exit_code, retry, fix = "no-space", 28, Retry.OPERATOR, "Grow the pool, or drop generations or a partial transfer."


class FreezeFailed(LandfallError):
    """The filesystem could not be frozen or was thawed before the generation was complete; no generation was made."""

    code, exit_code, retry, fix = "freeze-failed", 29, Retry.LATER, "Try again; if it persists raise the freeze time limit."


class NoSuchVolume(LandfallError):
    """No volume of that name or identity is known here."""

    code, exit_code, retry, fix = "no-such-volume", 30, Retry.OPERATOR, "`landfall volume list` shows what there is."


class VolumeExists(LandfallError):
    """A volume of that name or identity exists already; it was not changed."""

    code, exit_code, retry, fix = "volume-exists", 31, Retry.NEVER, "Choose another name."


class NameRefused(LandfallError):
    """A name has characters that are not allowed; allowed are [A-Za-z0-9_.][A-Za-z0-9_.-]* up to 64 characters."""

    code, exit_code, retry, fix = "name-refused", 32, Retry.NEVER, "Use letters, digits, _ . and -, not - first."


class NoSuchGeneration(LandfallError):
    """The generation is not (or no longer) held by this node."""

    code, exit_code, retry, fix = "no-such-generation", 33, Retry.OPERATOR, "Replicate in full, or name a generation that is listed."


class BaseMismatch(LandfallError):
    """NAS 2 does not hold the base of this differential (volume, epoch, counter and id must all agree), or its base was written to."""

    code, exit_code, retry, fix = "base-mismatch", 34, Retry.OPERATOR, "Replicate from a generation both nodes hold, or in full."


class NoSuchTransfer(LandfallError):
    """The transfer is not known here: never begun, committed long ago, or discarded."""

    code, exit_code, retry, fix = "no-such-transfer", 35, Retry.NEVER, "`landfall status` shows open transfers."


class TransferBusy(LandfallError):
    """Another transfer or salvage of this volume is under way."""

    code, exit_code, retry, fix = "transfer-busy", 36, Retry.LATER, "Wait for it, or discard it."


class DmiMalformed(LandfallError):
    """The differential management information is damaged or hostile; it was refused whole and nothing was written."""

    code, exit_code, retry, fix = (
        "dmi-malformed",
        37,
        Retry.NEVER,
        "Build it again on the source; if it persists the source is not to be trusted.",
    )


class RecordMalformed(LandfallError):
    """The arrival record does not belong to this DMI or its header is damaged; pieces it named are fetched again."""

    code, exit_code, retry, fix = (
        "record-malformed",
        38,
        Retry.RECONNECT,
        "Resume the transfer; if the source is gone, nothing of it can be salvaged.",
    )


class ProtocolViolated(LandfallError):
    """The peer sent a frame or message that the protocol does not allow; the connection was closed."""

    code, exit_code, retry, fix = "protocol-violated", 39, Retry.RECONNECT, "Update both nodes to the same release."


class VersionUnknown(LandfallError):
    """A file or a peer has a format or protocol version this release does not know; it was left as it is."""

    code, exit_code, retry, fix = "version-unknown", 40, Retry.OPERATOR, "Update this node, or the peer."


class PeerRefused(LandfallError):
    """The peer could not prove that it is the node this transfer was ordered for (certificate, identity or token)."""

    code, exit_code, retry, fix = (
        "peer-refused",
        41,
        Retry.NEVER,
        "Start the transfer again from the management node; check the node's identity.",
    )


class LinkLost(LandfallError):
    """The connection to the peer broke or went silent past the time limit. What had arrived is kept."""

    code, exit_code, retry, fix = (
        "link-lost",
        42,
        Retry.RECONNECT,
        "It resumes when the peer is back; if the peer is gone: `landfall salvage`.",
    )


class NodeUnreachable(LandfallError):
    """The management node cannot reach a node over SSH."""

    code, exit_code, retry, fix = "node-unreachable", 43, Retry.RECONNECT, "Check the node, its network and its sshd."


class HostKeyChanged(LandfallError):
    """A node shows another SSH host key than the one pinned at enrolment; no connection was made."""

    code, exit_code, retry, fix = "host-key-changed", 44, Retry.OPERATOR, "Find out why; enrol the node again only if the change was yours."


class FileNotWhole(LandfallError):
    """The update instruction designates a file that did not arrive whole by NAS 2's own record; the instruction was refused."""

    code, exit_code, retry, fix = "file-not-whole", 45, Retry.NEVER, "Fetch DMI and arrival record again and determine anew."


class SalvageFailed(LandfallError):
    """Salvage stopped before its result was committed; the base is untouched and the salvage can be run again."""

    code, exit_code, retry, fix = "salvage-failed", 46, Retry.OPERATOR, "Mend the cause and run `landfall salvage` again."


class VerifyFailed(LandfallError):
    """What was written does not read back as what was sent; it was not committed."""

    code, exit_code, retry, fix = "verify-failed", 47, Retry.LATER, "Check the disk of the node; then run it again."


class ReplicaDiffers(LandfallError):
    """The two nodes' copies of a generation are not equal, or one is not what its digest table says; the report names the files."""

    code, exit_code, retry, fix = "replica-differs", 90, Retry.OPERATOR, "`landfall verify VOLUME --heal`, then look at the node's disk."


class RestoreIncomplete(LandfallError):
    """Some of the files could not be restored from the generation; each is named with its reason. The others are restored."""

    code, exit_code, retry, fix = "restore-incomplete", 92, Retry.OPERATOR, "Mend what stands beside each file, and restore those again."


class NothingKept(LandfallError):
    """Nothing is kept of a node that was overtaken, or not any more: it was not resynchronised yet, or held nothing of its own."""

    code, exit_code, retry, fix = "nothing-kept", 93, Retry.OPERATOR, "`landfall resync` keeps and lists what a node that returned holds."


class NotListed(LandfallError):
    """The list of what a node that returned still holds does not name this file, so there is nothing to bring."""

    code, exit_code, retry, fix = "not-listed", 94, Retry.OPERATOR, "`landfall rescue VOLUME` lists what there is."


class NotTogether(LandfallError):
    """These volumes cannot be frozen together: they have not one primary, or some have a transfer under way that the others have not."""

    code, exit_code, retry, fix = "not-together", 95, Retry.OPERATOR, "Name volumes of one primary, and let open transfers end first."


class CheckFailed(LandfallError):
    """`landfall check` found something that would fail on the bad night; the list says what, and what to do about each."""

    code, exit_code, retry, fix = "check-failed", 91, Retry.OPERATOR, "Mend what is FAILED, then run `landfall check` again."


class FailpointHit(LandfallError):
    """A failpoint that a test armed raised here."""

    code, exit_code, retry, fix = "failpoint-hit", 48, Retry.NEVER, "Unset LANDFALL_FAILPOINTS."


class LabMissing(LandfallError):
    """The local lab is not up, or one of its nodes is not running."""

    code, exit_code, retry, fix = "lab-missing", 49, Retry.OPERATOR, "`landfall lab up`, or `landfall lab start NODE`."


class KernelLacks(LandfallError):
    """The kernel has no support for something this step needs (loop devices, XFS, btrfs, network namespaces ...)."""

    code, exit_code, retry, fix = (
        "kernel-lacks",
        50,
        Retry.OPERATOR,
        "Load the named module (modprobe), or use a machine whose kernel has it.",
    )


class DrillFailed(LandfallError):
    """The drill ran, and the independent checker found a file that is falsely recovered, missed, or changed though untouched."""

    code, exit_code, retry, fix = "drill-failed", 51, Retry.NEVER, "Keep the report; it names the files."


class NotificationUnhandled(LandfallError):
    """A reception failure notification waits for the operator's decision (resume or salvage)."""

    code, exit_code, retry, fix = (
        "notification-unhandled",
        52,
        Retry.OPERATOR,
        "`landfall status`, then `landfall replicate` or `landfall salvage`.",
    )


class RequestRefused(LandfallError):
    """A request had an unknown verb, a missing or extra field, or a value of the wrong type."""

    code, exit_code, retry, fix = "request-refused", 53, Retry.NEVER, "Update the management node and the agents to the same release."


class PrimaryAlive(LandfallError):
    """The primary answers, so its transfer can be resumed and nothing need be lost; or it still serves, and two nodes must not both."""

    code, exit_code, retry, fix = (
        "primary-alive",
        54,
        Retry.OPERATOR,
        "`landfall replicate` resumes; `--declare-dead` if it is to be given up.",
    )


class PathRefused(LandfallError):
    """The operating system refused a file or folder of this machine: it is missing, of another kind, not ours to write, or full."""

    code, exit_code, retry, fix = "path-refused", 55, Retry.OPERATOR, "Check the path, its permissions and the room on its filesystem."


class GenerationInvalid(LandfallError):
    """The kernel gave up a snapshot that ran out of room or could not be written: its content is lost, and nothing of it was used.

    The volume that it was a snapshot of, and every other generation, are as they were.
    """

    code, exit_code, retry, fix = (
        "generation-invalid",
        66,
        Retry.OPERATOR,
        "Look at dmesg. Drop it, replicate from another generation that both nodes hold; give snapshots more room (snapshot_percent).",
    )


class EpochStale(LandfallError):
    """The order names another epoch than the node's own: somebody was promoted meanwhile, or the order is out of date. Nothing was done."""

    code, exit_code, retry, fix = (
        "epoch-stale",
        56,
        Retry.OPERATOR,
        "`landfall status` shows who is primary at the highest epoch; order it of that node.",
    )


class NotPrimary(LandfallError):
    """Only the primary of a volume may serve it, hold its address, or have a lease for it; this node is its secondary. Nothing was done."""

    code, exit_code, retry, fix = "not-primary", 57, Retry.OPERATOR, "`landfall status` shows who is; `landfall failover` changes it."


class AddressTaken(LandfallError):
    """Another node on the link answers for the service address. It was not taken: clients would reach the one or the other."""

    code, exit_code, retry, fix = (
        "address-taken",
        58,
        Retry.OPERATOR,
        "Find who has it (the cause names the hardware address) and let it give it up; then do it again.",
    )


class LeaseEnded(LandfallError):
    """The lease for serving a volume ran out, or the node was booted since: it gave the volume up, and a renewal comes too late."""

    code, exit_code, retry, fix = (
        "lease-ended",
        60,
        Retry.OPERATOR,
        "If nobody else was promoted meanwhile, `landfall serve VOLUME` begins anew; `landfall status` shows it.",
    )


class StaleTerm(LandfallError):
    """Another management node has taken over since this one was in charge, or its catalog is an old copy. The agents obey it no more."""

    code, exit_code, retry, fix = (
        "stale-term",
        59,
        Retry.OPERATOR,
        "Let the other one work; if this one is to be in charge, `landfall takeover` on it.",
    )


class FenceMissing(LandfallError):
    """No fence is configured for a node, so nothing can prove that it does not write any more. Nothing was changed."""

    code, exit_code, retry, fix = (
        "fence-missing",
        80,
        Retry.OPERATOR,
        "Give the node a `fence` in landfall.toml (`manual` asks you), or `--force`, which is recorded as a split brain.",
    )


class FenceUnproved(LandfallError):
    """The fence of a node gave no proof that it cannot write any more; its exit code and words are in the cause. Nothing was promoted."""

    code, exit_code, retry, fix = (
        "fence-unproved",
        81,
        Retry.OPERATOR,
        "Switch the node off and run it again; `--force` promotes without proof and is recorded as a split brain.",
    )


class FailoverBusy(LandfallError):
    """A failover of this volume is under way, or was broken off and waits to be resumed. Nothing was changed."""

    code, exit_code, retry, fix = (
        "failover-busy",
        82,
        Retry.LATER,
        "`landfall failover VOLUME` goes on with one that was broken off; wait for one that runs.",
    )


class SplitBrain(LandfallError):
    """A node was promoted without proof that the other cannot write, so both may hold what the other lacks. Nothing is replicated."""

    code, exit_code, retry, fix = (
        "split-brain",
        83,
        Retry.OPERATOR,
        "`landfall resync VOLUME --discard-from NODE` keeps what NODE holds as a generation, lists it, and lets it follow the other.",
    )


def by_code() -> dict[str, type[LandfallError]]:
    """Return every error class by its code."""

    def below(cls: type[LandfallError]) -> list[type[LandfallError]]:
        return [cls, *(found for child in cls.__subclasses__() for found in below(child))]

    return {cls.code: cls for cls in below(LandfallError)}


def explain(code: str) -> str | None:
    """Return the long text for an error code, None for a code that is not ours."""
    cls = by_code().get(code)
    if cls is None:
        return None
    return f"{cls.code} (exit status {cls.exit_code}, retry: {cls.retry})\n\n{cls.__doc__}\n\nFix: {cls.fix}"
