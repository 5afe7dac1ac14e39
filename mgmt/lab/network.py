"""The lab's network: a namespace for each node, one for clients, one for the switch, so that the machine's own network is not touched.

Facts: the bridge port flag `isolated` is IFLA_BRPORT_ISOLATED of rtnetlink(7); a namespace is named by a bind mount of its
nsfs file below /run/netns, as `ip netns` does.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping
from functools import partial
from ipaddress import ip_address
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from agent.contract.errors import NotOurs
from agent.system.failpoint import failpoint
from agent.system.run import run
from mgmt.lab.cuts import Pair, Port, ports
from mgmt.lab.layout import CLIENTS_ADDRESS, NAMESPACES, Lab, NodeName
from mgmt.lab.namespace import with_links

BRIDGE = "switch"
LINK = "lan0"
LOOPBACK_INDEX = 1
IFA_F_NODAD = 0x02


def create(lab: Lab) -> None:
    """Make namespaces, switch and links. If we die on the way, `remove` takes away what there is."""
    for name in lab.namespaces:
        _create_namespace(lab, name)
    with_links(lab.switch, lambda switch: _make_switch(lab, switch))
    for node in NodeName:
        with_links(lab.namespace(node), partial(_address, {node.address: 24, node.address6: 64}))
    with_links(lab.clients, partial(_address, {CLIENTS_ADDRESS: 24}))


def apply_cuts(lab: Lab, cut: frozenset[Pair], off: frozenset[NodeName]) -> None:
    """Make exactly the pairs in ``cut`` unable to exchange a packet, and those nodes that are ``off`` with anybody."""

    def set_ports(switch: IPRoute) -> None:
        for node, port in ports(cut).items():
            index = _index(switch, node)
            switch.brport("set", index=index, isolated=int(port is Port.ISOLATED))
            switch.link("set", index=index, state="down" if port is Port.DOWN or node in off else "up")

    with_links(lab.switch, set_ports)
    for node in NodeName:
        with_links(lab.namespace(node), _forget_neighbours)


def forget_services(lab: Lab, node: NodeName) -> None:
    """Take from a node's link what it was given while it ran: its namespace outlives it, and would answer for service addresses."""
    own = {node.address, node.address6}

    def forget(links: IPRoute) -> None:
        for found in list(links.get_addr(index=_index(links, LINK))):
            address = found.get("address")
            if address not in own and not ip_address(address).is_link_local:
                links.addr("del", index=found["index"], address=address, prefixlen=found["prefixlen"])

    if os.path.ismount(NAMESPACES / lab.namespace(node)):
        with_links(lab.namespace(node), forget)


def end_nfs(lab: Lab, node: NodeName) -> None:
    """End the kernel's NFS server of a node: its threads are none of the node's processes, and keep its volumes and its namespace."""
    path = NAMESPACES / lab.namespace(node)
    if "\tnfsd\n" in Path("/proc/filesystems").read_text() and os.path.ismount(path):
        end = "mount -t nfsd nfsd /proc/fs/nfsd && echo 0 >/proc/fs/nfsd/threads"  # the one of the namespace we are in
        run(["nsenter", f"--net={path}", "--", "unshare", "--mount", "--propagation=private", "--", "sh", "-c", end])


def present(lab: Lab) -> bool:
    """Whether all of the lab's namespaces are there."""
    return all(os.path.ismount(NAMESPACES / name) for name in lab.namespaces)


def inode(name: str) -> int | None:
    """Return the inode number by which /proc/PID/ns/net tells a namespace, None where it is not there."""
    path = NAMESPACES / name
    return path.stat().st_ino if os.path.ismount(path) else None


def remove(lab: Lab) -> list[str]:
    """Take away the lab's namespaces and return their names; NotOurs for one of that name which is not the lab's."""
    removed = []
    for name in lab.namespaces:
        path = NAMESPACES / name
        if os.path.ismount(path):
            _require_ours(lab, name)
            with_links(name, _delete_links)
            run(["umount", str(path)])
        if path.exists():
            path.unlink()
            removed.append(name)
    return removed


def _create_namespace(lab: Lab, name: str) -> None:
    path = NAMESPACES / name
    NAMESPACES.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o444, exist_ok=False)
    failpoint("lab.namespace_named")
    run(["unshare", f"--net={path}", "true"])
    failpoint("lab.namespace_made")
    with_links(name, lambda links: links.link("set", index=LOOPBACK_INDEX, state="up", ifalias=lab.alias))


def _make_switch(lab: Lab, switch: IPRoute) -> None:
    # Snooping would hold back neighbour discovery until a querier is heard, and there is none.
    switch.link("add", ifname=BRIDGE, kind="bridge", br_stp_state=0, br_mcast_snooping=0)
    bridge = _index(switch, BRIDGE)
    switch.link("set", index=bridge, state="up")
    ports_to = {**{str(node): lab.namespace(node) for node in NodeName}, "clients": lab.clients}
    for port, name in ports_to.items():
        with open(path_of(name), "rb") as namespace:
            switch.link("add", ifname=port, kind="veth", peer={"ifname": LINK, "net_ns_fd": namespace.fileno()})
        switch.link("set", index=_index(switch, port), master=bridge, state="up")


def _address(addresses: Mapping[str, int], links: IPRoute) -> None:
    link = _index(links, LINK)
    links.link("set", index=link, state="up")
    for address, length in addresses.items():
        # Duplicate address detection would take a second, and these addresses are nobody else's.
        links.addr("add", index=link, address=address, prefixlen=length, **({"flags": IFA_F_NODAD} if ":" in address else {}))


def _forget_neighbours(links: IPRoute) -> None:
    """Let a healed link be used at once: who was looked for in vain is otherwise refused until the kernel looks again."""
    for entry in list(links.get_neighbours(ifindex=_index(links, LINK))):
        with contextlib.suppress(NetlinkError):  # it may have gone by itself meanwhile
            links.neigh("del", ifindex=entry["ifindex"], dst=entry.get("dst"))


def _require_ours(lab: Lab, name: str) -> None:
    links = with_links(name, lambda connection: list(connection.get_links()))
    alias = next((link.get("ifalias") for link in links if link["index"] == LOOPBACK_INDEX), None)
    # One link and no alias: its maker died before it could put the marker in, and there is nothing in it to lose.
    if alias != lab.alias and (alias is not None or len(links) > 1):
        raise NotOurs(f"the network namespace {name} is not this lab's", cause=f"its marker is {alias!r}")


def _delete_links(links: IPRoute) -> None:
    """Delete links by themselves: a copy of the namespace's mount elsewhere would keep them alive."""
    for link in list(links.get_links()):
        if link["index"] != LOOPBACK_INDEX and link.get(("linkinfo", "kind")) in {"veth", "bridge"}:
            try:
                links.link("del", index=link["index"])
            except NetlinkError as error:
                if error.code != errno.ENODEV:  # it went with its peer
                    raise


def _index(links: IPRoute, name: str) -> int:
    found: list[int] = list(links.link_lookup(ifname=str(name)))
    if not found:
        raise NotOurs(f"the lab's link {name} is missing", fix="`landfall lab down`, then `landfall lab up`.")
    return found[0]


def path_of(name: str) -> Path:
    """Return the file by which a program enters a namespace."""
    return NAMESPACES / name
