"""The management node's service: replicates by schedule, resumes what broke off, keeps what is to be kept, and says what it does and why.

schedule  when a volume is due, by systemd's calendar
decision  what is to be done for a volume now, from facts alone
cycle     the facts asked of the agents, the decision, the act, one sentence in the history
service   cycles until it is told to stop; one service works, another waits

What is true is asked of the agents in every cycle. What stands only in memory (how long a node has been silent, how often an order failed)
makes a restart more patient, never hastier.
"""
