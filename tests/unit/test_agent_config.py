"""The agent's configuration: every key known, every refusal names the key."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from agent.config import Config, read_config
from agent.contract.errors import ConfigInvalid

SAMPLE = Path(__file__).parents[2] / "agent" / "agent.toml.sample"
GOOD = 'node = "nas1"\nreplication_address = "192.0.2.11"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "agent.toml"
    path.write_text(text)
    return path


def test_the_sample_has_every_key_with_its_default() -> None:
    config = read_config(SAMPLE)
    for field in fields(Config):
        assert field.default is MISSING or getattr(config, field.name) == field.default, field.name
        assert f"\n{field.name} = " in SAMPLE.read_text()


def test_what_is_not_said_is_the_default(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, GOOD))
    assert (config.node, config.lab, config.smb_port) == ("nas1", False, 445)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("colour = 1", "colour"),
        ("lab = 1", "lab"),
        ("smb_port = true", "smb_port"),
        ('freeze_limit_s = "10"', "freeze_limit_s"),
        ('state_dir = "state"', "state_dir"),
        ("[node]", "TOML"),
    ],
)
def test_a_key_that_is_unknown_or_of_the_wrong_type_is_named(tmp_path: Path, line: str, named: str) -> None:
    with pytest.raises(ConfigInvalid, match=named):
        read_config(written(tmp_path, GOOD + line + "\n"))


@pytest.mark.parametrize("node", ["", "-h", "a b", "x;y", "../x"])
def test_J10_a_node_name_that_is_not_plain_is_refused(tmp_path: Path, node: str) -> None:
    with pytest.raises(ConfigInvalid, match="node"):
        read_config(written(tmp_path, f'node = "{node}"\nreplication_address = "192.0.2.1"\n'))


def test_a_missing_key_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="replication_address"):
        read_config(written(tmp_path, 'node = "nas1"\n'))
    with pytest.raises(ConfigInvalid, match="nowhere"):
        read_config(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    "lines",
    ['substrate = "zfs"', 'substrate = "lvm-thin"', 'volume_group = "vg0"'],
)
def test_a_substrate_is_known_and_has_what_it_lies_on(tmp_path: Path, lines: str) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f'node = "nas1"\nreplication_address = "192.0.2.11"\n{lines}\n')
    with pytest.raises(ConfigInvalid, match=r"substrate|volume_group"):
        read_config(path)


def test_a_volume_group_is_named_for_lvm_thin(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text('node = "nas1"\nreplication_address = "192.0.2.11"\nsubstrate = "lvm-thin"\nvolume_group = "vg0"\n')
    assert read_config(path).volume_group == "vg0"
