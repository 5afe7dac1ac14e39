"""``python -m mgmt.drill.checker``: exit status 0 if every figure is 0, 1 if one is not, 2 for wrong use or what could not be read.

--base IMAGE --target IMAGE   the source's frozen generations (an image that is one hole is an empty base)
--filesystem ext4|xfs
--result DIR|IMAGE            the mounted tree that NAS 2 serves, or a copy of its volume
--loss LOSS.json              see loss.py; without it the result must be the target
--dmi FILE --arrival FILE     as NAS 2 has them; without both the transfer counts as complete
--smb //HOST/SHARE [PATH ...] read these files, or --smb-files chosen ones, with a real client (--smb-client "ip netns exec X smbclient -N")
--out CHECK.json              the figures and the first 200 findings; without it they are printed

--digests IMAGE --filesystem ...  only: every file of a frozen image with its attributes and digest, to --out or printed
--generation-equal IMAGE IMAGE   only: are two images equal, holes being zeros
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shlex
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from mgmt.drill.checker.blocks import differing_blocks, read_arrival
from mgmt.drill.checker.digests import listing
from mgmt.drill.checker.extents import blocks_of
from mgmt.drill.checker.loss import LossStatement, read_loss
from mgmt.drill.checker.smb import choose, read_back
from mgmt.drill.checker.trees import EMPTY, data_ranges, let_go_of_mounts, mounted, read_tree
from mgmt.drill.checker.verdict import Evidence, Verdict, changed_files, judge

_OWN_NAMESPACE = "LANDFALL_CHECKER_NAMESPACE"
_FINDINGS = 200


def main(argv: list[str]) -> int:
    """Return the exit status."""
    asked = _parse(argv)
    if asked.generation_equal:
        return _generation_equal(*asked.generation_equal)
    if _OWN_NAMESPACE not in os.environ:
        # Our mounts are nobody else's, and go when we do.
        command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "mgmt.drill.checker", *argv]
        os.execvpe(command[0], command, {**os.environ, _OWN_NAMESPACE: os.readlink("/proc/self/ns/mnt")})
    if os.environ[_OWN_NAMESPACE] != os.readlink("/proc/self/ns/mnt"):
        let_go_of_mounts(asked.base, asked.target, asked.digests, asked.result, asked.loss, asked.dmi, asked.arrival, asked.out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    started = time.monotonic()
    try:
        if asked.digests:
            with mounted(asked.digests, asked.filesystem) as root:
                _give(asked.out, json.dumps(listing(str(root))))
            return 0
        loss = read_loss(asked.loss) if asked.loss else None
        verdict = _check(asked, loss)
    except (OSError, ValueError, RuntimeError) as error:
        sys.stderr.write(f"checker: {error}\n")
        return 2
    document = _document(verdict, time.monotonic() - started)
    _give(asked.out, json.dumps(document, indent=1))
    return int(any(verdict.counts.values()))


def _give(out: Path | None, text: str) -> None:
    if out:
        out.write_text(text + "\n")
    else:
        sys.stdout.write(text + "\n")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mgmt.drill.checker", description="Hold a recovery against the source's generations.")
    for name in ("base", "target", "result", "loss", "dmi", "arrival", "digests", "out"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--filesystem", choices=("ext4", "xfs"))
    parser.add_argument("--smb", nargs="+", metavar=("SHARE", "PATH"))
    parser.add_argument("--smb-files", type=int, default=25)
    parser.add_argument("--smb-client", default="smbclient -N", help="the client and its options, and what runs it")
    parser.add_argument("--generation-equal", nargs=2, type=Path, metavar="IMAGE")
    asked = parser.parse_args(argv)
    if asked.digests and not asked.filesystem:
        parser.error("--digests needs --filesystem")
    if not asked.generation_equal and not asked.digests and not (asked.base and asked.target and asked.result and asked.filesystem):
        parser.error("--base, --target, --filesystem and --result are needed")
    if bool(asked.dmi) != bool(asked.arrival):
        parser.error("--dmi and --arrival go together")
    return asked


def _check(asked: argparse.Namespace, loss: LossStatement | None) -> Verdict:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16), hard))
    arrival = read_arrival(asked.dmi, asked.arrival) if asked.dmi else None
    with ExitStack() as stack:
        target_root = stack.enter_context(mounted(asked.target, asked.filesystem))
        base_root = None if _is_hole(asked.base) else stack.enter_context(mounted(asked.base, asked.filesystem))
        result_root = stack.enter_context(mounted(asked.result, asked.filesystem)) if asked.result.is_file() else asked.result
        # Forked now, so that the readers are in the namespace of the mounts; they are gone before the mounts are.
        pool = stack.enter_context(ProcessPoolExecutor(min(4, os.cpu_count() or 2), multiprocessing.get_context("fork")))
        target_job = pool.submit(read_tree, target_root, "target", handles=True)
        base_job = pool.submit(read_tree, base_root, "base", handles=True) if base_root else None
        result_job = pool.submit(read_tree, result_root, "result", handles=False)
        blocks_job = pool.submit(differing_blocks, asked.base, asked.target)
        target, base = target_job.result(), base_job.result() if base_job else EMPTY
        changed = changed_files(base, target)
        extents = {}
        if arrival is not None:
            regular = [node.inode for identity in changed if (node := target.nodes[target.by_identity[identity][0]]).kind == 0o100000]
            extents = blocks_of(asked.target, asked.filesystem, regular)
        evidence = Evidence(base, target, result_job.result(), blocks_job.result(), extents, arrival)
    verdict = judge(evidence, loss)
    if asked.smb:
        _check_smb(asked, evidence, loss, verdict)
    return verdict


def _check_smb(asked: argparse.Namespace, evidence: Evidence, loss: LossStatement | None, verdict: Verdict) -> None:
    share, *names = asked.smb
    paths = [os.fsencode(name) for name in names]
    if not paths:
        recovered = [path for entry in loss.files if entry.outcome == "recovered" for path in entry.paths] if loss else []
        known = evidence.target.nodes
        identities = [known[path].identity for path in recovered if path in known] or list(evidence.target.by_identity)
        paths = choose(evidence.target, identities, asked.smb_files)
    if unknown := [path for path in paths if path not in evidence.target.nodes]:
        raise ValueError(f"the target has no {os.fsdecode(unknown[0])!r} to read over SMB")
    for path, what in read_back(share, shlex.split(asked.smb_client), evidence.target, paths):
        verdict.add("false_recovered", path, what)
    verdict.smb_files = len(paths)


def _is_hole(image: Path) -> bool:
    with image.open("rb") as file:
        return next(data_ranges(file.fileno(), _size(image)), None) is None


def _size(image: Path) -> int:
    """Return the bytes of a file or a block device."""
    with image.open("rb") as file:
        return file.seek(0, os.SEEK_END)


def _document(verdict: Verdict, seconds: float) -> dict[str, object]:
    return {
        **verdict.counts,
        "compared_files": verdict.compared_files,
        "compared_bytes": verdict.compared_bytes,
        "smb_files": verdict.smb_files,
        "whole_but_for_identical_blocks": verdict.whole_but_for_identical_blocks,
        "outcomes": verdict.outcomes,
        "seconds": round(seconds, 2),
        "findings": [{"figure": figure, "path": os.fsdecode(path), "what": what} for figure, path, what in verdict.findings[:_FINDINGS]],
    }


def _generation_equal(first: Path, second: Path) -> int:
    try:
        blocks = differing_blocks(first, second)
        sizes = {_size(path) for path in (first, second)}
    except OSError as error:
        sys.stderr.write(f"checker: {error}\n")
        return 2
    equal = not len(blocks) and len(sizes) == 1
    sys.stdout.write(json.dumps({"equal": equal, "differing_blocks": len(blocks), "first": blocks[:10].tolist()}) + "\n")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
