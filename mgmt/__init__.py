"""What runs on the management node as `landfall`, in the order in which a failure passes it.

inventory      the nodes, and how each is reached
reach          SSH to a node's agent
authority      certificates for both ends of a transfer
determination  the verdict per file, from recorded facts alone
losses         what kept loss statements say of a file
report, view   the one account of what happened; tables, JSON and HTML are skins on it
catalog        what is remembered of volumes, transfers, notifications and salvages
fencing        the proof that a node cannot write any more
run            the operations: replicate, salvage and the rest
bundle         what somebody who helps must know
failover       the plan, the journal and the steps by which the other node takes over, and the way back
lab, drill     three nodes on one machine, and the failure rehearsed on them
cli            the commands
"""
