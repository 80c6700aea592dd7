"""`python -m atoll.client` is fl-client."""

from atoll.client.cli import main

main()
