"""Services, hardening, volumes, mounts, exports, addresses and ports of the machines, after the drill, with nas1 switched on again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from testinfra.host import Host

from tests.vm.clients import shares
from tests.vm.run import ADDRESS, OWN_ADDRESSES, Run, Volume

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


def test_every_logical_volume_has_a_meaning(nas: Host, run: Run, volumes: dict[str, list[Volume]]) -> None:
    """No stray snapshot, nothing half made, no workspace of another transfer."""
    if run.report["substrate"] == "reflink":
        pytest.skip("there are no logical volumes on reflink")
    found = volumes[nas.backend.get_hostname()]
    assert found
    words = ("volume", "generation", "operational", "workspace", "pool")
    internal = ("_tdata", "_tmeta", "_pmspare")
    assert [volume for volume in found if not any(volume.says(word) for word in words) and not volume.name.endswith(internal)] == []
    assert [volume for volume in found if volume.says("unfinished") or volume.says("instead-of")] == []
    working = [tag for volume in found for tag in volume.tags if tag.startswith(f"landfall/workspace/1/{run.volume}/")]
    assert all(run.prepared["transfer"] in tag for tag in working)


def test_a_thin_pool_errors_when_it_is_full(nas: Host, run: Run, volumes: dict[str, list[Volume]]) -> None:
    if run.report["substrate"] != "lvm-thin":
        pytest.skip("only lvm-thin has a pool")
    (pool,) = [volume for volume in volumes[nas.backend.get_hostname()] if volume.says("pool")]
    assert (pool.kind, pool.when_full) == ("thin-pool", "error")


def test_each_nas_has_the_base_and_the_newest_generation_it_can_have(run: Run, nas: Host, volumes: dict[str, list[Volume]]) -> None:
    """On nas2 that is what was recovered, and nothing that calls itself the target; or the target, if the transfer was resumed."""
    name = nas.backend.get_hostname()
    wanted, sent = [run.prepared["base"], run.newest[name]], run.prepared["target"]
    if run.report["substrate"] == "reflink":
        found = nas.check_output("ls /var/lib/landfall/pool/volumes/%s/generations", run.volume).split()
        names = [f"{generation['counter']:08}-{generation['nonce'][:8]}" for generation in (*wanted, sent)]
    else:
        found = [tag for volume in volumes[name] for tag in volume.tags]
        names = [run.tag_of(generation) for generation in (*wanted, sent)]
    assert [[word for word in found if word.startswith(name)] != [] for name in names] == [True, True, sent in wanted]


# --- mounts, exports, address, ports ---


def test_who_serves_has_the_volume_mounted_writable_and_the_other_has_not(run: Run, server: Host, standby: Host) -> None:
    mounted = server.mount_point(run.mount_point)
    assert mounted.exists
    assert mounted.filesystem == run.report["fs"]
    assert "rw" in mounted.options
    source = server.check_output("realpath %s", mounted.device)
    assert {f"/dev/{device['kname']}" for device in below(lsblk(server)) if run.mount_point in device["mountpoints"]} == {source}
    assert not standby.mount_point(run.mount_point).exists


def test_nothing_of_the_volume_is_mounted_twice(run: Run, server: Host) -> None:
    targets = server.check_output("findmnt --list --noheadings --output TARGET --types ext4,xfs").split()
    assert [target for target in targets if run.name in target] == [run.mount_point]


def test_the_volume_is_a_share_of_who_serves_and_of_nobody_else(run: Run, mgmt: Host) -> None:
    for node in ("nas1", "nas2"):
        assert (run.name in shares(mgmt, OWN_ADDRESSES[node])) == (node == run.server)
    assert run.name in shares(mgmt, ADDRESS)


def test_every_machine_has_its_own_address_and_who_serves_the_volumes_as_well(run: Run, mgmt: Host, server: Host, standby: Host) -> None:
    for host, more in ((mgmt, []), (standby, []), (server, [ADDRESS])):
        addresses = json.loads(host.check_output("ip -json -4 address show to 10.78.0.0/24"))
        own = OWN_ADDRESSES[host.backend.get_hostname()]
        assert [entry["local"] for link in addresses for entry in link.get("addr_info", [])] == [own, *more]


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


def test_both_agents_answer_and_one_of_them_may_write(mgmt: Host, run: Run) -> None:
    (standing,) = json.loads(mgmt.check_output("landfall status %s --json", run.name))
    facts = {side["node"]: side["facts"] for side in (standing["primary"], standing["secondary"])}
    assert standing["primary"]["node"] == run.server
    assert {node: told["serving"] for node, told in facts.items()} == {"nas1": run.server == "nas1", "nas2": run.server == "nas2"}
    assert facts[run.server]["epoch"] == standing["volume"]["epoch"] == run.epoch
