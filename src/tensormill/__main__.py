"""`python -m tensormill`."""

from tensormill.cli.app import main

main()
