"""What clients reach: exports of the operational volume.

samba   one smbd per node, its shares rewritten and reloaded
"""
