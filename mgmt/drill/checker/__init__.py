"""An own program that holds what NAS 2 serves against the source's frozen generations; it shares no code with what it checks.

Standard library and numpy only, nothing of agent or mgmt but its own modules. In the order of the data's way:

trees      mount a frozen generation read-only; read every promised attribute and the content of a tree
blocks     the blocks in which two images differ; own readers of the DMI's piece columns and of the arrival record
extents    where a file's blocks lie, by debugfs or xfs_db
loss       the loss statement, and what it needs to say
verdict    the figures: false_recovered, missed, untouched_differ, unlisted_blocks
__main__   ``python -m mgmt.drill.checker``
"""
