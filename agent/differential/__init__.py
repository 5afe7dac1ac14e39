"""From two frozen generations and the blocks that differ to the differential management information, in the order of the data's way.

reader        what a filesystem must tell: changed inodes, owners of changed blocks, extents
intervals     runs of blocks: cutting, covering, intersecting
ext4_layout   superblock, group descriptors and allocation maps of ext4
ext4_extents  extent trees and block maps of raw ext4 inodes
ext4, xfs     the readers
inodes        attributes of changed inodes, through the mounted generation
names         the inode-to-name index of a generation
digests       the digest table of a generation
pieces        owners' runs to pieces, and which pieces a file needs
rows          changed inodes to rows of files
build         all of it together: the DMI
"""
