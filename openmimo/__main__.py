"""`python -m openmimo` is the command line."""

from openmimo.cli import main

main()
