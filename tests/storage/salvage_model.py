"""What a salvage must make of two trees, by the rules for whole files, written on paths: an opinion apart from the plan's."""

from __future__ import annotations

from collections.abc import Collection

from agent.contract.dmi import FileKind
from tests.storage.salvage_scene import Identity, Node, Walk

HELD = b".landfall-held"


def expected(base: Walk, target: Walk, whole: Collection[Identity], *, hold: bool) -> dict[bytes, tuple[Node, Identity]]:
    """Return node and identity of every path; ``whole`` are the changed inodes that are designated."""
    result: dict[bytes, Identity] = {}
    missing: set[bytes] = set()
    for path, identity in target.paths.items():
        if identity in base.nodes or identity in whole or target.nodes[identity].kind == FileKind.DIRECTORY:
            result[path] = identity
        else:
            missing.add(path)
    where: dict[bytes, bytes] = {b"": b""}  # of base directories
    for path, identity in base.paths.items():
        if base.nodes[identity].kind == FileKind.DIRECTORY and identity in target.nodes:
            where[path] = next(found for found, other in target.paths.items() if other == identity)
    aside: dict[bytes, Identity] = {}
    for path, identity in sorted(base.paths.items(), key=lambda item: item[0].count(b"/") if item[0] else -1):
        if identity in target.nodes:
            continue
        above, _, name = path.rpartition(b"/")
        here = _join(where[above], name)
        is_folder = base.nodes[identity].kind == FileKind.DIRECTORY
        there = result.get(here)
        if is_folder and there is not None and there not in base.nodes and target.nodes[there].kind == FileKind.DIRECTORY:
            where[path] = here
            continue
        if there is None and (hold or (here in missing and not is_folder)):
            result[here] = identity
            where[path] = here
        elif there is not None and hold:
            aside[_join(HELD, path)] = identity
            where[path] = _join(HELD, path)
        else:
            where[path] = b"\0gone/" + path  # nothing is there
    result |= aside
    return {path: (_node(base, target, identity, whole), identity) for path, identity in result.items()}


def _node(base: Walk, target: Walk, identity: Identity, whole: Collection[Identity]) -> Node:
    before, after = base.nodes.get(identity), target.nodes.get(identity)
    if before is None:
        assert after is not None
        return after
    return after if after is not None and identity in whole else before


def _join(above: bytes, name: bytes) -> bytes:
    return above + b"/" + name if above else name


def compare(found: Walk, wanted: dict[bytes, tuple[Node, Identity]]) -> list[str]:
    """Return every difference in paths, nodes and hard-link groups."""
    differences = []
    made = {path for path in wanted if path.startswith(HELD + b"/")}
    folders = {path[:at] for path in made for at in range(len(path)) if path[at : at + 1] == b"/"} - set(wanted)
    for path in sorted(found.paths.keys() | wanted.keys()):
        if path not in wanted:
            if path not in folders:
                differences.append(f"{path!r} should not be there")
        elif path not in found.paths:
            differences.append(f"{path!r} is missing")
        elif found.node(path) != wanted[path][0]:
            one, other = found.node(path), wanted[path][0]
            fields = [name for name in Node.__slots__ if getattr(one, name) != getattr(other, name)]
            words = [f"{name} {str(getattr(one, name))[:60]} for {str(getattr(other, name))[:60]}" for name in fields]
            differences.append(f"{path!r} differs: {'; '.join(words)}")
    groups = {tuple(sorted(path for path in wanted if wanted[path][1] == identity)) for _, identity in wanted.values()}
    here = {tuple(paths) for identity, paths in found.names().items() if not (len(paths) == 1 and paths[0] in folders)}
    differences += [f"hard links {group} are not as they must be" for group in groups ^ here]
    return differences
