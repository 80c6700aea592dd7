"""`python -m atoll.server` is fl-server."""

from atoll.server.cli import main

main()
