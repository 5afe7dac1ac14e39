"""Fencing: the proof that a node cannot write a volume any more, before another is promoted.

Each fence is a program of its own, ours (``python -m mgmt.fencing.NAME``) or an operator's. It reads one JSON line, says one JSON line, and
its exit code says what came of it. What it says is judged here; nothing but code 0 with a proof that names this node, this volume and this
epoch is a proof.

kinds     the fences there are
protocol  what is asked and answered, the exit codes, the frame of our own programs
proof     a program run and judged

manual    a person types that the node cannot write
libvirt   a virtual machine is destroyed
lab       a node of the local lab loses its power
lease     the lease of a node that gives up by itself is waited out
ssh_stop  the node is asked to stop; for labs, since a node that is alive enough to be asked may be asked to go on
"""
