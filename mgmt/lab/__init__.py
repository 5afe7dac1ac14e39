"""Three nodes on one machine, with nothing between them but a network that can be cut.

layout     names, addresses and paths; the marker without which nothing is destroyed
cuts       which bridge ports stand how, from the pairs of nodes that are cut
namespace  doing something inside a network namespace, from a thread
network    namespaces, switch and links
enrolment  keys, pinned host keys, the configuration files of the nodes
loops      loop devices, found by the identity of the file behind them
groups     volume groups of the nodes, and what device-mapper has made of their disks
furnish    making new namespaces into a machine of their own
node       what runs as a node's first process
control    asking a node's first process for something
processes  a lab's processes, and their end
remains    what a lab, alive or broken, has left on the machine, and taking it away
lifecycle  up, down, kill, start, pause, wake, cut, heal
proxy      a TCP proxy that does something at an exact byte
"""
