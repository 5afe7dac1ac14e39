"""What runs on every NAS as `landfall-agent`, in the order in which data passes it.

contract      what both sides agree on: messages, states, errors, formats
system        the only door to programs, the clock, durable files, raw system calls, failpoints
blockio       the O_DIRECT copy path and the digests taken on it
volume        operational and differential volumes, their devices and generations
differential  changed blocks, their owners and names: the differential management information
transfer      send order, sender, receiver, streams
recovery      landing volume, salvage, verification, commit
serving       addresses and exports
service       the requests an agent answers; daemon and cli run it
"""
