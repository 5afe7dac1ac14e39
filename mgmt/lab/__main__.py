"""`python -m mgmt.lab`."""

from mgmt.lab.cli import main

main()
