"""A world of two NAS and two management nodes in one thread, where what can go wrong goes wrong at moments that follow from a seed.

What decides who may write runs as it is delivered: watch, failover, fencing and its witness, the agents' serving, leases, tenures, keeper,
lookout and term. Replaced are the clock, the network, the disk, and what of a machine's kernel clients reach.

world       events in the order of their time, tasks that wait for them, processes that stand still, die and start again
network     links that are cut one way or both, requests that are late, or take effect while their answer gets lost
machine     a NAS: power, clock, mounts, exports, addresses, and a disk that outlives all of that
agent       an agent and its keeper on such a machine
data_path   what stands for a transfer
management  a management node: the service, an operator's commands, fences
schedule    what happens when, from a seed
observer    looks at the machines after every event, and knows nothing of the product
play        one run from its seed to its verdict

``python -m tests.simulation --seed N --verbose`` shows one.
"""
