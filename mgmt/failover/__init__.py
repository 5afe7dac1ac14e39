"""Failover and the way back, in the order in which a failure passes it.

plan      what is to be done, from recorded facts alone; every refusal
journal   the steps of a failover, durable: which are done, and what came of them
witness   whether the primary is gone, by two paths
steps     what each step does, and what happens if we die in it
account   what a failover cost: seconds, and how much time of the volume was lost
driver    a failover from the first look to the record, or from where it stopped
returned  what a node that returned still holds, and what changed meanwhile
rescue    single files of it, brought to where the volume is served
failback  the node that returns: what it holds is kept and listed, then it follows, then it takes over again
rehearsal what a failover would end in, read, compared and mounted; nothing is changed
view      plans and accounts as tables

states.dot shows the steps; a test holds it to the plans.
"""
