"""`python -m service.cli`: the command line where the `moorage` script is not installed."""

from service.cli.main import main

main()
