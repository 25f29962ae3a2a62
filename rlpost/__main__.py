"""`python -m rlpost` is `rlpost`; launchers of several processes need it."""

from rlpost.cli import main

main()
