"""What runs on the management node as `landfall`, in the order in which a failure passes it.

inventory      the nodes, and how each is reached
reach          SSH to a node's agent
catalog        what is known of volumes, generations and transfers
determination  the verdict per file, from recorded facts alone
plan, run      what to do about it, and the doing
report         the one account of what happened; tables, JSON and HTML are skins on it
lab, drill     three nodes on one machine, and the failure rehearsed on them
cli            the commands
"""
