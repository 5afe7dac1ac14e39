"""The operations: each asks the agents for the facts, decides, orders, and records what came of it.

site          what operations work on: configuration, catalog, authority, the nodes
roles         who is primary: the agents say so, the catalog follows
volumes       add or adopt a volume, list, lay down its policy, serve it or stop
notices       notifications fetched, stored, acknowledged
retention     generations let go, and held
replication   a generation, its differential, a transfer, resumed while both nodes live; discard
together      generations of several volumes, of one moment
removal       the end of a volume
restoring     single files from a generation
leases        who serves under one, and what a fence may go by
standing      how a volume stands: both sides' facts, open transfers with their gauge
preflight     everything that must be right before the bad night
verification  both copies of a generation compared, and made equal
salvage       the evidence fetched, determined, the update instruction, the loss statement; undo
"""

from mgmt.run.notices import collect, wait_for_failure
from mgmt.run.preflight import CheckState, Finding, preflight, worst
from mgmt.run.removal import remove_volume
from mgmt.run.replication import Prepared, Replicated, discard, prepare, replicate
from mgmt.run.restoring import restore
from mgmt.run.retention import hold, release_hold
from mgmt.run.salvage import Salvage, done_since, newest_statement, undo, verdicts
from mgmt.run.salvage import salvage as salvage_volume
from mgmt.run.site import Site, Teller
from mgmt.run.standing import NodeView, Standing, gauge_of, standing
from mgmt.run.together import Together, prepare_together, replicate_together
from mgmt.run.verification import Damage, Verified, verify
from mgmt.run.volumes import add_volume, adopt_volume, grow_volume, list_volumes, move_address, serve, set_volume, unserve

__all__ = [
    "CheckState",
    "Damage",
    "Finding",
    "NodeView",
    "Prepared",
    "Replicated",
    "Salvage",
    "Site",
    "Standing",
    "Teller",
    "Together",
    "Verified",
    "add_volume",
    "adopt_volume",
    "collect",
    "discard",
    "done_since",
    "gauge_of",
    "grow_volume",
    "hold",
    "list_volumes",
    "move_address",
    "newest_statement",
    "preflight",
    "prepare",
    "prepare_together",
    "release_hold",
    "remove_volume",
    "replicate",
    "replicate_together",
    "restore",
    "salvage_volume",
    "serve",
    "set_volume",
    "standing",
    "undo",
    "unserve",
    "verdicts",
    "verify",
    "wait_for_failure",
    "worst",
]
