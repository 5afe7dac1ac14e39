"""Rules of the tree that neither the type checker nor the layers of imports can state."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def imported_modules(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def shared_with_checked(source: str) -> list[str]:
    own = "mgmt.drill.checker"
    return [
        name
        for name in imported_modules(source)
        if name.split(".")[0] in {"", "agent", "mgmt"} and name != own and not name.startswith(f"{own}.")
    ]


def test_the_independent_checker_shares_no_code_with_what_it_checks() -> None:
    checkers = sorted((ROOT / "mgmt" / "drill").glob("checker*"))
    for checker in checkers:
        sources = [checker] if checker.is_file() else sorted(checker.rglob("*.py"))
        for source in sources:
            assert shared_with_checked(source.read_text()) == [], source


def test_the_rule_for_the_checker_sees_every_kind_of_import() -> None:
    assert shared_with_checked("import agent.contract") == ["agent.contract"]
    assert shared_with_checked("def f():\n    from mgmt import report") == ["mgmt"]
    assert shared_with_checked("from . import fill") == ["."]
    assert shared_with_checked("from mgmt.drill.checkers import loss") == ["mgmt.drill.checkers"]
    assert shared_with_checked("import hashlib, os.path") == []
    assert shared_with_checked("from mgmt.drill.checker.trees import Tree") == []


def test_mgmt_knows_of_the_agent_its_contract_and_its_door_to_the_system() -> None:
    for source in (ROOT / "mgmt").rglob("*.py"):
        agents = [name for name in imported_modules(source.read_text()) if name.split(".")[0] == "agent"]
        assert [name for name in agents if name.split(".")[:2][-1] not in {"contract", "system"}] == [], source


def test_J_unknown_host_keys_are_never_accepted() -> None:
    lenient = re.compile("AutoAdd" + "Policy|Warning" + "Policy|StrictHostKeyChecking[= ](no|off|accept-new)")
    for package in ("agent", "mgmt", "playbooks"):
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                assert not lenient.search(path.read_text(errors="replace")), path
