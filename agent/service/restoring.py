"""The verbs that bring single files into the volume that this node serves: from a generation here, or from another node's.

The volume's job is not taken: replication and clients go on. If we die here each file is the old or the new one.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from agent.contract import messages as m
from agent.contract.errors import DeviceBusy, LandfallError, NoSuchGeneration
from agent.contract.identity import GenerationId, empty_generation
from agent.recovery.gather import Directory, Inode, Spot, refuse_unplain
from agent.recovery.rescue import FileOrder, FileReceiver, send_files
from agent.recovery.restore import Guard, Restored, Restorer, restore
from agent.service.generations import view
from agent.service.node import Node, ProgressCall, open_mount
from agent.system.handles import open_beneath
from agent.volume.substrate import VolumeRecord

log = logging.getLogger("landfall.agent")


def restore_files(node: Node, arguments: m.RestoreFiles, progress: ProgressCall) -> m.Restored:
    """Copy files from a generation that this node holds into the volume that it serves; DeviceBusy unless it serves it."""
    record = _served(node, arguments.generation.volume)
    node.generation(arguments.generation)
    with (
        view(node, record, arguments.generation, "restore") as found,
        open_mount(node.mount_point(record)) as target_fd,
        _guarded(node, record, arguments.files, arguments.untouched_since) as guard,
    ):
        done = restore(found.mount_fd, target_fd, _spots(arguments.files), with_below=arguments.with_below, guard=guard)
    return _answer(done)


def receive_files(node: Node, arguments: m.ReceiveFiles, progress: ProgressCall) -> m.Listening:
    """Open the data port for an order of files, and take what comes in the background; DeviceBusy unless this node serves the volume.

    The files of an order that breaks off are old or new; whoever sends them is told, and asks again.
    """
    record = _served(node, arguments.volume)
    order = _order(arguments)

    @contextmanager
    def target() -> Iterator[Restorer]:
        with (
            open_mount(node.mount_point(_served(node, record.id))) as target_fd,
            _guarded(node, record, arguments.files, arguments.untouched_since) as guard,
            Restorer(target_fd, guard) as restorer,
        ):
            yield restorer

    receiver = FileReceiver(order, node.config.replication_address, target)

    def run() -> None:
        try:
            receiver.run()
        except LandfallError as error:
            log.warning("files for volume %s: %s", record.name, error)
        except Exception:
            log.exception("files for volume %s were not taken", record.name)
        finally:
            node.rescues.pop(order.id, None)

    node.rescues[order.id] = receiver
    threading.Thread(target=run, name=f"rescue {order.id}", daemon=True).start()
    return m.Listening(receiver.address, receiver.port)


def send_some(node: Node, arguments: m.SendFiles, progress: ProgressCall) -> m.Restored:
    """Send files of a generation that this node holds; the answer is what the other node made of them."""
    record = node.record(arguments.generation.volume)
    node.generation(arguments.generation)
    with view(node, record, arguments.generation, "rescue") as found:
        done = send_files(
            _order(arguments),
            found.mount_fd,
            arguments.address,
            arguments.port,
            rate_limit_bytes_s=arguments.rate_limit_bytes_s,
            tell=lambda sent, total: progress("files", sent, total),
        )
    return _answer(done)


def _served(node: Node, volume: object) -> VolumeRecord:
    record = next((found for found in node.substrate.volumes() if found.id == volume), None)
    if record is None or not node.serving(record):
        raise DeviceBusy(
            f"node {node.config.node} does not serve volume {record.name if record else volume}",
            fix="Serve it, or name the node that does with --node.",
        )
    return record


def _order(arguments: m.ReceiveFiles | m.SendFiles) -> FileOrder:
    spots = _spots(arguments.files)
    refuse_unplain(path for spot in spots for path in (spot.path, spot.at))
    return FileOrder(arguments.rescue, spots, arguments.token, arguments.tls, arguments.silence_limit_s)


def _spots(files: tuple[m.PlacedFile, ...]) -> tuple[Spot, ...]:
    return tuple(Spot(os.fsencode(found.path), os.fsencode(found.at)) for found in files)


@contextmanager
def _guarded(node: Node, record: VolumeRecord, files: tuple[m.PlacedFile, ...], since: GenerationId | None) -> Iterator[Guard]:
    """Yield what says whether a file may be replaced: one that is to be, or that is as it was in the generation ``since``.

    Without ``since`` none may, but for those. A generation that is not held any more proves nothing.
    """
    replaced = {os.fsencode(found.at) for found in files if found.replace}
    with ExitStack() as stack:
        base_fd = -1
        try:
            if since is not None and since != empty_generation(record.id):  # which has no filesystem
                node.generation(since)
                base_fd = stack.enter_context(view(node, record, since, "rescue-base")).mount_fd
        except NoSuchGeneration:
            log.info("generation %s is not held any more: nothing proves that a file is as it was", since)

        def guard(coming: Directory | Inode, there: os.stat_result) -> str:
            at = coming.spot.at
            if at in replaced:
                return ""
            if isinstance(coming, Directory):
                return "it is there"
            is_same = (stat.S_IFMT(there.st_mode), there.st_size, there.st_mtime_ns) == (
                stat.S_IFMT(coming.attributes.mode),
                coming.size_bytes,
                coming.attributes.mtime_ns,
            )
            return "" if is_same or _is_untouched(base_fd, at, there) else "what is there was changed since, or is another file"

        yield guard


def _is_untouched(base_fd: int, at: bytes, there: os.stat_result) -> bool:
    """Whether what is there is as the base has it; a change that puts the old time back shows in the time of the inode's change."""
    if base_fd < 0:
        return False
    try:
        looked_fd = open_beneath(base_fd, at, os.O_PATH | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        base = os.fstat(looked_fd)
    finally:
        os.close(looked_fd)
    return (base.st_mode, base.st_ino, base.st_size, base.st_mtime_ns, base.st_ctime_ns) == (
        there.st_mode,
        there.st_ino,
        there.st_size,
        there.st_mtime_ns,
        there.st_ctime_ns,
    )


def _answer(done: Restored) -> m.Restored:
    refused = tuple(m.RefusedPath(os.fsdecode(found.spot.path), found.reason) for found in done.refused)
    return m.Restored(done.files, done.length_bytes, refused)
