"""Services, hardening, volumes, mounts, exports, addresses and ports of the machines, after the drill, with nas1 switched on again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from testinfra.host import Host

from tests.vm.run import Run, Volume

MAX_EXPOSURE = 6.5
"""Of 10, by systemd-analyze: the agent mounts and makes devices, so some of what would lower it is not to be had (its unit says why)."""
DIRECTIVES = {
    "NoNewPrivileges": "yes",
    "RestrictNamespaces": "yes",
    "RestrictRealtime": "yes",
    "LockPersonality": "yes",
    "MemoryDenyWriteExecute": "yes",
    "ProtectClock": "yes",
    "ProtectHostname": "yes",
    "DevicePolicy": "closed",
    "SystemCallArchitectures": "native",
    "LimitCORE": "0",
    "Restart": "on-failure",
}
NEVER = {"cap_sys_module", "cap_sys_ptrace", "cap_sys_boot", "cap_sys_rawio", "cap_sys_time"}
SERVED_PORTS = {22, 445, 2049}
"""SSH, SMB and NFS: all that a NAS may listen on while no transfer runs."""


def properties(host: Host, unit: str, *names: str) -> dict[str, str]:
    words = " ".join(f"--property={name}" for name in names)
    return dict(line.split("=", 1) for line in host.check_output(f"systemctl show {words} {unit}").splitlines())


def lsblk(host: Host) -> list[dict[str, Any]]:
    """Block devices with what lies on them; lsblk's own words, since testinfra's block_device takes a disk for a partition."""
    tree: list[dict[str, Any]] = json.loads(host.check_output("lsblk --json --bytes --output NAME,KNAME,SERIAL,TYPE,MOUNTPOINTS"))[
        "blockdevices"
    ]
    return tree


def below(devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [found for device in devices for found in (device, *below(device.get("children", [])))]


# --- services ---


def test_the_agent_runs_and_starts_at_boot(nas: Host) -> None:
    agent = nas.service("landfall-agent")
    assert agent.is_running
    assert agent.is_enabled


def test_the_agent_did_not_fall_over(nas2: Host) -> None:
    assert properties(nas2, "landfall-agent", "NRestarts", "Result") == {"NRestarts": "0", "Result": "success"}


def test_the_configurations_are_right_and_nobody_elses(nas: Host, mgmt: Host) -> None:
    assert nas.run("/opt/landfall/venv/bin/landfall-agent check-config").rc == 0
    assert mgmt.run("/opt/landfall/venv/bin/landfall check-config").rc == 0
    for host, path in ((nas, "/etc/landfall/agent.toml"), (mgmt, "/etc/landfall/landfall.toml")):
        file = host.file(path)
        assert (file.user, file.group) == ("root", "root")
        assert not file.mode & 0o022


def test_the_systems_own_samba_is_out_of_the_way(nas: Host) -> None:
    for unit in ("smbd", "nmbd"):
        service = nas.service(unit)
        assert not service.is_running
        assert not service.is_enabled


def test_the_secrets_are_roots_alone(mgmt: Host, nas: Host) -> None:
    for host, folder in ((mgmt, "/var/lib/landfall/mgmt"), (mgmt, "/etc/landfall/keys"), (nas, "/var/lib/landfall/state")):
        assert host.file(folder).mode == 0o700
        assert host.check_output("find %s -perm /077 -type f -name '*key*' ! -name '*.pub'", folder) == ""


# --- hardening ---


def test_the_units_exposure_is_what_block_devices_allow(nas: Host) -> None:
    words = nas.check_output("systemd-analyze security --no-pager landfall-agent.service | tail -n 1")
    assert float(words.split(":")[1].split()[0]) <= MAX_EXPOSURE, words


def test_the_unit_has_its_directives(nas: Host) -> None:
    assert properties(nas, "landfall-agent", *DIRECTIVES) == DIRECTIVES
    rest = properties(nas, "landfall-agent", "CapabilityBoundingSet", "RestrictAddressFamilies", "SystemCallFilter", "ExecStartPre")
    assert not NEVER & set(rest["CapabilityBoundingSet"].split())
    assert set(rest["RestrictAddressFamilies"].split()) == {"AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET"}
    assert "check-config" in rest["ExecStartPre"]
    assert "init_module" not in rest["SystemCallFilter"]


# --- volumes ---


def test_the_group_lies_on_the_disk_with_the_nodes_serial_and_says_whose_it_is(nas: Host, run: Run) -> None:
    disks = [device for device in lsblk(nas) if device["serial"] == f"landfall-{nas.backend.get_hostname()}"]
    assert len(disks) == 1
    assert disks[0]["type"] == "disk"
    if run.report["substrate"] == "reflink":
        return
    (row,) = json.loads(nas.check_output("pvs --reportformat json --options pv_name,vg_name,vg_tags"))["report"][0]["pv"]
    assert row["pv_name"] == f"/dev/{disks[0]['name']}"
    assert {"landfall", "landfall-lab"} <= set(row["vg_tags"].split(","))


def test_every_logical_volume_has_a_meaning(nas: Host, run: Run, request: pytest.FixtureRequest) -> None:
    """No stray snapshot, nothing half made, no workspace of another transfer."""
    if run.report["substrate"] == "reflink":
        pytest.skip("there are no logical volumes on reflink")
    volumes: list[Volume] = request.getfixturevalue("volumes1" if nas.backend.get_hostname() == "nas1" else "volumes2")
    assert volumes
    words = ("volume", "generation", "operational", "workspace", "pool")
    internal = ("_tdata", "_tmeta", "_pmspare")
    assert [volume for volume in volumes if not any(volume.says(word) for word in words) and not volume.name.endswith(internal)] == []
    assert [volume for volume in volumes if volume.says("unfinished") or volume.says("instead-of")] == []
    working = [tag for volume in volumes for tag in volume.tags if tag.startswith(f"landfall/workspace/1/{run.volume}/")]
    assert all(run.statement["transfer"] in tag for tag in working)


def test_a_thin_pool_errors_when_it_is_full(nas: Host, run: Run, request: pytest.FixtureRequest) -> None:
    if run.report["substrate"] != "lvm-thin":
        pytest.skip("only lvm-thin has a pool")
    volumes: list[Volume] = request.getfixturevalue("volumes1" if nas.backend.get_hostname() == "nas1" else "volumes2")
    (pool,) = [volume for volume in volumes if volume.says("pool")]
    assert (pool.kind, pool.when_full) == ("thin-pool", "error")


def test_nas1_still_has_both_generations_and_nas2_the_base_and_what_was_recovered(
    run: Run, request: pytest.FixtureRequest, nas1: Host, nas2: Host
) -> None:
    if run.report["substrate"] == "reflink":
        for host, names in ((nas1, ("base", "target")), (nas2, ("base", "generation"))):
            for name in names:
                found = run.statement[name]
                assert host.check_output(
                    "ls /var/lib/landfall/pool/volumes/%s/generations | grep -c %s",
                    run.volume,
                    f"{found['counter']:08}-{found['nonce'][:8]}",
                )
        return
    for volumes, names in (("volumes1", ("base", "target")), ("volumes2", ("base", "generation"))):
        tags = [tag for volume in request.getfixturevalue(volumes) for tag in volume.tags]
        for name in names:
            assert [tag for tag in tags if tag.startswith(run.tag_of(name))], (volumes, name)
    assert not [tag for volume in request.getfixturevalue("volumes2") for tag in volume.tags if tag.startswith(run.tag_of("target"))]


# --- mounts, exports, address, ports ---


def test_nas2_has_the_volume_mounted_writable_and_nas1_does_not(run: Run, nas1: Host, nas2: Host) -> None:
    mounted = nas2.mount_point(run.mount_point)
    assert mounted.exists
    assert mounted.filesystem == run.report["fs"]
    assert "rw" in mounted.options
    source = nas2.check_output("realpath %s", mounted.device)
    assert {f"/dev/{device['kname']}" for device in below(lsblk(nas2)) if run.mount_point in device["mountpoints"]} == {source}
    assert not nas1.mount_point(run.mount_point).exists


def test_nothing_of_the_volume_is_mounted_twice(run: Run, nas2: Host) -> None:
    targets = nas2.check_output("findmnt --list --noheadings --output TARGET --types ext4,xfs").split()
    assert [target for target in targets if run.name in target] == [run.mount_point]


def shares(client: Host, address: str) -> list[str]:
    """Return what a node says it shares; patiently, as an emulated one takes its time to start what answers this."""
    rows = [line.split("|") for line in client.run(f"smbclient -N -g -t 180 -L //{address}").stdout.splitlines()]
    return [row[1] for row in rows if row[0] == "Disk"]


def test_the_volume_is_a_share_of_nas2_and_of_nobody_else(run: Run, mgmt: Host) -> None:
    assert run.name in shares(mgmt, "10.78.0.12")
    assert run.name in shares(mgmt, run.address)
    assert shares(mgmt, "10.78.0.11") == []


def test_every_machine_has_its_own_address_and_nas2_the_volumes_as_well(run: Run, mgmt: Host, nas1: Host, nas2: Host) -> None:
    for host, has in ((mgmt, ["10.78.0.10"]), (nas1, ["10.78.0.11"]), (nas2, ["10.78.0.12", run.address])):
        addresses = json.loads(host.check_output("ip -json -4 address show to 10.78.0.0/24"))
        assert [entry["local"] for link in addresses for entry in link.get("addr_info", [])] == has


def test_no_port_is_open_but_those_of_ssh_smb_and_nfs(nas: Host) -> None:
    """The data port above all, which is open only while a transfer runs."""
    lines = nas.check_output("ss --no-header --listening --tcp --numeric").splitlines()
    listening = {(line.split()[3].rsplit(":", 1)[0], int(line.split()[3].rsplit(":", 1)[1])) for line in lines}
    reachable = {port for address, port in listening if not address.startswith(("127.", "[::1]"))}
    assert reachable - SERVED_PORTS == set()


def test_the_management_node_listens_for_ssh_alone(mgmt: Host) -> None:
    lines = mgmt.check_output("ss --no-header --listening --tcp --numeric").splitlines()
    reachable = {line.split()[3].rsplit(":", 1)[1] for line in lines if not line.split()[3].startswith(("127.", "[::1]"))}
    assert reachable == {"22"}


def test_both_agents_answer_and_nas2_is_the_one_that_may_write(mgmt: Host, run: Run) -> None:
    (standing,) = json.loads(mgmt.check_output("landfall status %s --json", run.name))
    facts = {side["node"]: side["facts"] for side in (standing["primary"], standing["secondary"])}
    assert standing["primary"]["node"] == "nas2"
    assert facts["nas2"]["serving"]
    assert facts["nas2"]["epoch"] == standing["volume"]["epoch"] == run.statement["target"]["epoch"] + 1
    assert not facts["nas1"]["serving"]


def test_nobody_took_over_before_an_operator_had_said_that_nas1_cannot_write(mgmt: Host, run: Run) -> None:
    (took,) = [found for found in json.loads(mgmt.check_output("landfall history %s --json", run.name)) if found["kind"] == "failover"]
    facts = took["facts"]
    assert (facts["source"], facts["target"], facts["epoch"]) == ("nas1", "nas2", run.statement["target"]["epoch"] + 1)
    assert (facts["fence"], facts["split_brain"]) == ("manual", False)
    assert facts["proof"]
    assert facts["operator"].startswith("root@")
