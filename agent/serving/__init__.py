"""What clients reach: exports of the operational volume.

exports     what a server of files must do, whatever its protocol, and in which order
samba       one smbd per node, its shares rewritten and reloaded
nfs         the kernel's NFS server
machine     what of it there can be another of: mounts, addresses, the server of SMB
address     where clients find a volume: taken, announced, given up
links       whether the node's network interfaces carry
path        whether a transfer would reach another node
tenure      who may serve, as this node knows it since its boot
unwritable  a volume made unwritable within a time limit
keeper      gives a volume up in time when its lease is not renewed
"""
