"""The independent checker on real filesystems: all zero on a right salvage, and each planted fault under its own figure."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.storage.checker_scene import IMAGE_BYTES, ROOT, Scene, build, checker, copy, run, writable


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return build(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def served(scene: Scene, tmp_path: Path) -> Iterator[Path]:
    """The result, mounted, for a test to spoil."""
    image = copy(scene.result, tmp_path / "served.img")
    with writable(image, tmp_path / "served", scene.filesystem) as root:
        yield root


def loops() -> set[str]:
    return set(run("losetup", "--list", "--noheadings", "--output", "BACK-FILE").split("\n"))


def test_a_right_salvage_has_no_finding(scene: Scene, served: Path) -> None:
    answer = scene.check(served)
    assert answer.document["findings"] == []
    assert answer.figures == {}
    assert answer.status == 0
    assert answer.document["compared_files"] > 45
    assert answer.document["outcomes"]["held"] == 3
    assert not any(str(scene.directory) in name for name in loops())


def test_a_copy_of_the_volume_is_as_good_as_its_tree(scene: Scene) -> None:
    answer = scene.check(scene.result)
    assert (answer.status, answer.document["findings"]) == (0, [])
    assert not any(str(scene.directory) in name for name in loops())


def test_the_digests_of_an_image_are_those_of_its_files(scene: Scene, served: Path, tmp_path: Path) -> None:
    out = tmp_path / "digests.json"
    run(sys.executable, "-m", "mgmt.drill.checker", "--digests", scene.result, "--filesystem", scene.filesystem, "--out", out)
    told = json.loads(out.read_text())
    assert told == json.loads(run(sys.executable, ROOT / "mgmt/drill/checker/digests.py", served))
    assert told["created"]["sha256"] == hashlib.sha256((served / "created").read_bytes()).hexdigest()
    one_byte(served)
    spoiled = json.loads(run(sys.executable, ROOT / "mgmt/drill/checker/digests.py", served))
    assert {path for path in told if told[path] != spoiled[path]} == {"created"}


def one_byte(root: Path) -> None:
    status = (root / "created").stat()
    with (root / "created").open("r+b") as file:
        file.seek(12_345)
        byte = file.read(1)
        file.seek(12_345)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(root / "created", ns=(status.st_mtime_ns, status.st_mtime_ns))


def one_nanosecond(root: Path) -> None:
    time = (root / "appended").stat().st_mtime_ns + 1
    os.utime(root / "appended", ns=(time, time))


def an_xattr(root: Path) -> None:
    os.setxattr(root / "attributes", "trusted.level", b"8")


def a_broken_hard_link(root: Path) -> None:
    status = (root / "link_c").stat()
    content = (root / "link_c").read_bytes()
    (root / "link_c").unlink()
    (root / "link_c").write_bytes(content)
    (root / "link_c").chmod(status.st_mode & 0o7777)
    os.utime(root / "link_c", ns=(status.st_mtime_ns, status.st_mtime_ns))


def a_mode(root: Path) -> None:
    (root / "attributes").chmod(0o755)


def an_acl(root: Path) -> None:
    run("setfacl", "-m", "u:1234:r", root / "moved")
    (root / "moved").chmod(0o644)


def a_chattr_flag(root: Path) -> None:
    run("chattr", "+d", root / "created")


def a_project(root: Path) -> None:
    run("chattr", "-p", "77", root / "created")


def a_symlink_target(root: Path) -> None:
    times = os.lstat(root / "symlink").st_mtime_ns
    (root / "symlink").unlink()
    (root / "symlink").symlink_to("old")
    os.utime(root / "symlink", ns=(times, times), follow_symlinks=False)


def a_missing_one(root: Path) -> None:
    (root / "pipe").unlink()


def a_mixture(root: Path) -> None:
    times = (root / "big").stat().st_mtime_ns
    with (root / "big").open("r+b") as file:
        file.seek(50_000)
        file.write(b"half of the new")
    os.utime(root / "big", ns=(times, times))


def the_absent_one(root: Path) -> None:
    (root / "new_lost").write_bytes(b"some")


def a_directory_time(root: Path) -> None:
    os.utime(root / "grown_dir", ns=(1, 1))


@pytest.mark.parametrize(
    "plant",
    [one_byte, one_nanosecond, an_xattr, a_broken_hard_link, a_mode, an_acl, a_chattr_flag, a_symlink_target, a_missing_one, a_mixture,
     the_absent_one, a_directory_time],
)  # fmt: skip
def test_I3_a_planted_false_recovery_is_caught(scene: Scene, served: Path, plant: Callable[[Path], None]) -> None:
    plant(served)
    answer = scene.check(served)
    assert answer.status == 1
    assert answer.figures == {"false_recovered": 1}, answer.document["findings"]


@pytest.mark.parametrize("scene", ["xfs"], indirect=True)  # ext4 keeps project ids only where the kernel has quotas
def test_I3_a_planted_project_is_caught(scene: Scene, served: Path) -> None:
    a_project(served)
    answer = scene.check(served)
    assert answer.status == 1
    assert answer.figures == {"false_recovered": 1}, answer.document["findings"]


def test_I4_a_file_that_arrived_whole_and_was_not_recovered_is_missed(scene: Scene, served: Path) -> None:
    answer = scene.check(served, missing=frozenset())
    assert answer.figures == {"missed": 2}
    assert {finding["path"] for finding in answer.document["findings"]} == {"big", "new_lost"}


def test_I4_one_missing_block_or_a_base_that_differs_keeps_a_file_from_being_whole(scene: Scene, served: Path) -> None:
    lost = sorted(scene.missing & set(scene.differing))
    assert scene.check(served, missing=frozenset([lost[0], lost[-1]])).figures == {}
    assert scene.check(served, missing=frozenset([lost[0]]), base_differs=frozenset([lost[-1]])).figures == {}


def test_I4_a_file_without_blocks_is_whole_by_its_record(scene: Scene, served: Path) -> None:
    rows = [row | {"outcome": "kept_at_base"} if row.get("paths") == ["pipe"] else row for row in scene.loss]
    assert scene.check(served, loss=rows).figures["missed"] == 1


def test_an_atomic_set_excuses_what_is_whole(scene: Scene, served: Path) -> None:
    rows = [row | {"reason": "its atomic set is not whole"} if row.get("reason") else row for row in scene.loss]
    assert scene.check(served, loss=rows, missing=frozenset()).figures == {}


def test_I5_an_untouched_file_that_changed_is_caught(scene: Scene, served: Path) -> None:
    (served / "same7").chmod(0o600)
    assert scene.check(served).figures == {"untouched_differ": 1}


def test_I5_a_file_that_is_in_neither_generation_is_caught(scene: Scene, served: Path) -> None:
    (served / "dir_renamed" / "extra").write_bytes(b"")
    times = (served / "dir_renamed" / "inside").stat().st_mtime_ns
    os.utime(served / "dir_renamed", ns=(times, times))
    assert scene.check(served).figures == {"untouched_differ": 1}


def test_I5_an_old_name_that_stayed_is_caught(scene: Scene, served: Path) -> None:
    (served / "moved_from").write_bytes(b"")
    assert scene.check(served).figures == {"untouched_differ": 1}


def test_I5_a_held_file_that_is_gone_is_caught(scene: Scene, served: Path) -> None:
    (served / "deleted").unlink()
    assert scene.check(served).figures == {"untouched_differ": 1}


def test_a_deletion_that_was_applied_against_the_policy_is_caught(scene: Scene, served: Path) -> None:
    (served / "deleted").unlink()
    rows = [row | {"outcome": "deleted"} if row.get("base_paths") == ["deleted"] else row for row in scene.loss]
    assert scene.check(served, loss=rows).figures == {"untouched_differ": 1}


@pytest.mark.parametrize("name", ["appended", "created", "dir_renamed", "pipe", "big"])
def test_a_changed_file_that_is_not_named_is_caught(scene: Scene, served: Path, name: str) -> None:
    rows = [row for row in scene.loss if row.get("paths") != [name]]
    assert scene.check(served, loss=rows).figures == {"false_recovered": 1}


def test_a_deleted_file_that_is_not_named_is_caught(scene: Scene, served: Path) -> None:
    rows = [row for row in scene.loss if row.get("base_paths") != ["deleted"]]
    assert scene.check(served, loss=rows).figures["false_recovered"] == 1


def test_a_DMI_that_leaves_out_a_block_is_caught(scene: Scene, served: Path) -> None:
    lost = scene.missing & set(scene.differing)
    unlisted = next(block for block in reversed(scene.differing) if block not in lost)
    assert scene.check(served, unlisted=unlisted).figures == {"unlisted_blocks": 1}


def test_without_a_loss_statement_the_result_must_be_the_target(scene: Scene, served: Path, tmp_path: Path) -> None:
    argv = ("--base", scene.base, "--target", scene.target, "--filesystem", scene.filesystem, "--result")
    assert checker(*argv, served).figures["false_recovered"] >= 2
    with writable(copy(scene.target, tmp_path / "right.img"), tmp_path / "right", scene.filesystem) as right:
        assert checker(*argv, right).status == 0
        (right / ".landfall-held").touch()
        assert checker(*argv, right).figures["untouched_differ"] == 1


def test_an_image_that_is_one_hole_is_an_empty_base(scene: Scene, served: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.img"
    with empty.open("wb") as file:
        file.truncate(IMAGE_BYTES[scene.filesystem])
    argv = ("--base", empty, "--target", scene.target, "--filesystem", scene.filesystem, "--result")
    with writable(copy(scene.target, tmp_path / "right.img"), tmp_path / "right", scene.filesystem) as right:
        assert checker(*argv, right).status == 0
        (right / "same3").unlink()
        assert checker(*argv, right).figures == {"false_recovered": 1}


def test_I6_two_generations_are_equal_or_not(scene: Scene, tmp_path: Path) -> None:
    twin = copy(scene.target, tmp_path / "twin.img")
    assert checker("--generation-equal", scene.target, twin).status == 0
    with twin.open("r+b") as file:
        file.seek(IMAGE_BYTES[scene.filesystem] - 1)
        file.write(b"\1")
    answer = checker("--generation-equal", scene.target, twin)
    assert (answer.status, answer.document["differing_blocks"]) == (1, 1)
    assert checker("--generation-equal", scene.base, scene.target).document["differing_blocks"] == len(scene.differing)


def test_a_running_checker_keeps_nobody_elses_mount_busy(scene: Scene, served: Path, tmp_path: Path) -> None:
    image = copy(scene.base, tmp_path / "other.img")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    argv = ["--base", scene.base, "--target", scene.target, "--filesystem", scene.filesystem, "--result", served, "--loss", pipe]
    with writable(image, tmp_path / "other", scene.filesystem):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        running = subprocess.Popen(
            [sys.executable, "-m", "mgmt.drill.checker", *map(str, argv)], env=environment, stderr=subprocess.DEVNULL
        )
        with pipe.open("w") as statement:  # opened: the checker waits in its namespace for the statement
            run("umount", tmp_path / "other")
            busy = str(image) in loops()
            statement.write("{}")
        assert running.wait(60) == 2
        run("mount", "--bind", tmp_path, tmp_path / "other")
    assert not busy


def test_wrong_use_ends_with_2(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for argv in (["--base", "x"], ["--generation-equal", str(tmp_path / "a"), str(tmp_path / "b")]):
        assert (
            subprocess.run(
                [sys.executable, "-m", "mgmt.drill.checker", *argv], capture_output=True, check=False, env=environment
            ).returncode
            == 2
        )


def test_an_image_that_is_no_filesystem_ends_with_2_and_leaves_nothing(tmp_path: Path) -> None:
    image = tmp_path / "none.img"
    image.write_bytes(bytes(4096) + b"nothing" * 4096)
    argv = ["--base", image, "--target", image, "--filesystem", "ext4", "--result", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "mgmt.drill.checker", *map(str, argv)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 2
    assert "mount" in done.stderr
    assert not list(tmp_path.glob("landfall-check-*"))
    assert str(image) not in loops()
