"""fl-peer: train without a server. The commands are named here; they are not built yet."""

import sys
from typing import NoReturn

import click

from atoll.protocols import console
from atoll.protocols.errors import PeerError


@click.group(name="fl-peer")
def cli() -> None:
    """Train one model among peers, without a server."""


def main() -> NoReturn:
    sys.exit(console.run(cli))


def _not_built(what: str) -> NoReturn:
    raise PeerError(
        "FL-P100", f"not built yet: this command {what}", "until then: `fl-server demo` trains here"
    )


@cli.command()
@console.json_option
def init(as_json: bool) -> None:
    """Start a new swarm and print the address that others join."""
    _not_built("will start a new swarm and print the address that others join")


@cli.command()
@click.argument("address", required=False)
@console.json_option
def join(address: str | None, as_json: bool) -> None:
    """Join a swarm at ADDRESS and train in it."""
    _not_built("will join the swarm at ADDRESS and train in it")


@cli.command()
@console.json_option
def status(as_json: bool) -> None:
    """Show this peer's swarm: members, epoch, bandwidth."""
    _not_built("will show this peer's swarm: its members, epoch and bandwidth")


@cli.command()
@console.json_option
def leave(as_json: bool) -> None:
    """Finish the current step, hand over, and leave the swarm."""
    _not_built("will finish the current step, hand over and leave the swarm")


@cli.command()
@console.json_option
def doctor(as_json: bool) -> None:
    """Check this machine's reachability, bandwidth and disk."""
    _not_built("will check this machine's reachability, bandwidth and disk")


@cli.command()
@console.json_option
def demo(as_json: bool) -> None:
    """Run a whole swarm of peers on this machine."""
    _not_built("will run a whole swarm of peers on this machine")
