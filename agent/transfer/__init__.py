"""From one agent to the other: the DMI, then the pieces, over mutually authenticated TLS streams.

order     in which order pieces go, so that as many files as possible are whole at any moment
store     a transfer's folder: what it is, its DMI, its arrival record; durable
tls       who is on the other side
stream    frames over one TLS connection, with heartbeat and silence limit
group     threads of which the first failure ends all
rate      the limit on bytes a second
work      what is left to send, and its data
sender    NAS 1's side
landing   pieces onto the landing volume, checked against the DMI and the base; then the arrival record
door      the port of one transfer: who may come in
receiver  NAS 2's side
"""
