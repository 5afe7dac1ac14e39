"""The failure, rehearsed on a lab with real files, and judged by a checker that knows nothing of the agent.

workload  fills a volume with real and odd files, and changes it in every way that files change
smb       the part of the changes that a real SMB client makes
checker   an own program: what was recovered, held against the source's frozen generations
"""
