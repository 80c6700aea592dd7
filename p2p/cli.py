"""fl-peer: found a run that needs no server, take part in one, look at it, leave it."""

import sys
from typing import NoReturn

import click

from atoll.p2p.cli_demo import demo
from atoll.p2p.cli_look import doctor, invite, leave, status
from atoll.p2p.cli_run import init, join, start
from atoll.protocols import console


@click.group(name="fl-peer")
@click.version_option(package_name="atoll", prog_name="fl-peer", message="%(prog)s %(version)s")
def cli() -> None:
    """Train one model among peers, without a server."""


def main() -> NoReturn:
    sys.exit(console.run(cli))


for command in (demo, init, join, start, status, invite, leave, doctor):
    cli.add_command(command)
