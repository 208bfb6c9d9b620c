"""`python -m recycle_cli`."""

from recycle_cli.cli.app import main

main()
