"""The configuration: the sample is right, and every mistake is named with its path."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from agent.contract.errors import ConfigInvalid
from mgmt.inventory import Inventory, NodeEntry, read_inventory

SAMPLE = Path(__file__).resolve().parents[2] / "mgmt" / "landfall.toml.sample"
NODE = '[[node]]\nname = "nas1"\naddress = "::1"\nssh_key = "key"\nhost_key = "ssh-ed25519 AAAA"\n'


def written(folder: Path, text: str) -> Path:
    for key in ("key", "keys/nas1", "keys/nas2"):
        (folder / key).parent.mkdir(exist_ok=True)
        (folder / key).touch(mode=0o600)
    path = folder / "landfall.toml"
    path.write_text(text)
    return path


def test_the_sample_has_every_key_and_shows_the_defaults(tmp_path: Path) -> None:
    text = SAMPLE.read_text()
    sample = read_inventory(written(tmp_path, text))
    assert [node.name for node in sample.node] == ["nas1", "nas2"]
    everything = read_inventory(written(tmp_path, re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)))
    assert everything == sample
    for kind in (Inventory, NodeEntry):
        for field in fields(kind):
            assert re.search(rf"^(# )?\[*{field.name}\b", text, re.MULTILINE), field.name


def test_relative_paths_start_from_the_files_folder(tmp_path: Path) -> None:
    found = read_inventory(written(tmp_path, f'state_dir = "../state"\n{NODE}'))
    assert found.state_dir.resolve() == tmp_path.parent / "state"
    assert found.entry("nas1").ssh_key == tmp_path / "key"
    with pytest.raises(ConfigInvalid, match="nas7"):
        found.entry("nas7")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("streems = 2\n", "unknown key streems"),
        (NODE + 'colour = "red"\n', r"unknown key colour.*node\[0\]"),
        (NODE.replace("ssh_key", "#"), r"ssh_key is missing.*node\[0\]"),
        ('streams = "2"\n', "must be int.*streams"),
        ("streams = true\n", "must be int.*streams"),
        ("streams = 0\n", "streams must be above 0"),
        ("keep_generations = 1\n", "keep_generations must be at least 2"),
        ("rate_limit_bytes_s = -1\n", "rate_limit_bytes_s"),
        (NODE + "ssh_port = 70000\n", r"node\[0\].ssh_port"),
        (NODE + NODE, "same name"),
        (NODE + 'fence = "axe"\n', r"node\[0\].fence is 'axe'"),
        (NODE + 'fence = "command"\n', r"node\[0\].fence_options.program"),
        (NODE + 'fence = "lab"\n', r"node\[0\].fence_options.directory"),
        (NODE + 'fence = "lease"\npausable = true\n', r"node\[0\].fence is lease"),
        (NODE + "pausable = 1\n", "must be bool.*pausable"),
        (NODE + 'fence = "manual"\nfence_options = { colour = 1 }\n', r"unknown key colour.*fence_options"),
        (NODE + 'fence = "manual"\nfence_options = { limit_s = 0 }\n', r"fence_options.limit_s"),
        (NODE.replace('"nas1"', '"--force"'), r"node\[0\].name"),
        (NODE.replace('"key"', '"nowhere"'), r"node\[0\].ssh_key"),
        (NODE.replace('"ssh-ed25519 AAAA"', '"AAAA"'), r"node\[0\].host_key"),
        ("node = 3\n", "node"),
        ("streams = \n", "cannot be read as TOML"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        read_inventory(written(tmp_path, text))
    assert re.search(named, str(caught.value)), str(caught.value)


def test_J14_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, NODE)
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(ConfigInvalid, match=r"chmod 600"):
        read_inventory(path)


def test_no_file_is_invalid_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid):
        read_inventory(tmp_path / "landfall.toml")
