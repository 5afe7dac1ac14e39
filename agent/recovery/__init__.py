"""Recovery on the secondary: the designated files of an unfinished transfer, stored into a clone of the base.

check    the update instruction, held against this node's own DMI and arrival record
content  the files' content from the landing volume, proved by digests
plan     the names that the result has (pure)
tree     the mounted clone: inodes by handle, names by directory
inode    one inode made, filled, given its attributes
apply    a plan stored into the clone
verify   everything read back from a fresh mount
mount    the private mounts
gather   single files read from a generation
restore  single files made in the operational volume
rescue   both of these, each on its own node
salvage  all of it, committed as a generation; undo, and the sweep after a crash
"""
