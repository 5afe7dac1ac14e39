"""The drill on virtual machines, driven from the machine that hosts them.

machines   a node as its host sees it: a command over SSH, an image copied out, bytes counted at its interface, its power switched off
images     where a node keeps a generation, by LVM's own report, and a copy of it on the host
plays      playbooks through ansible-runner, with what they do as it happens
death      the power of nas1, cut at a share of the bytes
scenario   the drill, in the order of events
"""
