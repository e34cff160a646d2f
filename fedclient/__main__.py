"""`python -m fedclient` is the command `fedclient`."""

from fedclient.cli import main

main()
