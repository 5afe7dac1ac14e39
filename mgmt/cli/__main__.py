"""``python -m mgmt.cli``."""

from mgmt.cli import main

main()
