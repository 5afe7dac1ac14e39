"""What both NAS systems and the management node agree on; everything imports it, it imports nothing of theirs.

errors       what an operator can act on, with code, exit code, cause and fix
identity     volumes, generations, transfers: who is who, never by path or clock
digest       block, piece and file digests
columns      the container of fixed-width columns that the DMI is stored in
dmi          differential management information: pieces, files, extents, names
arrival      the arrival record: which pieces came, durable beside the DMI
messages     the control plane: verbs, arguments, results as typed JSON
frames       the data plane: frames between two agents

FORMAT.md gives the bytes.
"""
