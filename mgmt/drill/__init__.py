"""The failure, rehearsed on a lab with real files, and judged by a checker that knows nothing of the agent.

scenario      what goes wrong, when, what is done about it, what must come of it: playbooks/scenarios, read strictly
workload      fills a volume with real and odd files, and changes it in every way that files change; SMB clients among them
sending       the order to replicate, as a program that can be killed
interruption  a replication that things happen to at exact bytes
strikes       what goes wrong, and what puts it right, in either lab; nodes: the local lab's, as what that happens to
onlooker      an SMB client that notices when its files are away
local, vm     the drill in either lab
evidence      what the checker is given and says
checker       an own program: what was recovered, held against the source's frozen generations
course        what happened; judgement holds it against the scenario, report tells it
"""
