"""fl-server: serve a run, watch it, show it off on this machine, or try it in virtual time."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from atoll.protocols import console, leaving, orphan, places, poller
from atoll.protocols.errors import UsageError
from atoll.server.cli_catalogue import COMMANDS, command
from atoll.server.cli_demo import demo
from atoll.server.cli_peers import joined, like_peers
from atoll.server.cli_run import run, status
from atoll.server.cli_simulate import simulate
from atoll.server.options import rules_of, run_options, spec_of, spelled_out

if TYPE_CHECKING:
    from atoll.p2p.behalf import Behalf
    from atoll.server.server import Server, Summary


@click.group(name="fl-server")
@click.version_option(package_name="atoll", prog_name="fl-server", message="%(prog)s %(version)s")
def cli() -> None:
    """Train one model on machines that keep their data."""


def main() -> NoReturn:
    poller.read_where_we_wait()
    code = console.run(cli)
    leaving.soon()
    sys.exit(code)


STOPPING = "stopping (Ctrl-C again ends at once; what is acknowledged is kept in any case)"

cli.add_command(demo)
cli.add_command(status)
cli.add_command(run)
cli.add_command(simulate)
for name in COMMANDS:
    cli.add_command(command(name))


@cli.command()
@run_options
@click.option(
    "--listen",
    default="127.0.0.1:7447",
    show_default=True,
    metavar="HOST:PORT",
    help="Where clients find the run; port 0 takes a free one.",
)
@click.option(
    "--state",
    type=places.Place(refusal=places.state_directory),
    default=Path("atoll-state"),
    show_default=True,
    help="Everything the run is; an existing one is continued.",
)
@click.option("--name", default="run", show_default=True, help="For people.")
@click.option(
    "--init",
    type=places.Place(folder=False),
    default=None,
    help="Start from this safetensors file.",
)
@click.option(
    "--lease",
    default=20.0,
    show_default=True,
    help="Seconds without a sign of life after which a client has left.",
)
@click.option(
    "--save-every", default=1, show_default=True, help="Versions between two on disk, at least."
)
@click.option("--keep", default=5, show_default=True, help="Newest versions kept on disk.")
@click.option(
    "--max-examples", default=0, metavar="N",
    help="A client that says it holds more counts as N: its weight.  [default: no bound]",
)  # fmt: skip
@click.option(
    "--peer", "invite", default="", metavar="INVITE",
    help="Join a run of peers as one of them, for all clients of this server: see docs/peers.md.",
)  # fmt: skip
@click.option("--stop-with-stdin", is_flag=True, hidden=True, help="When the parent is gone.")
@click.option(
    "--insecure-lan", is_flag=True, help="Serve other machines although nothing is encrypted yet."
)
@console.json_option
def start(
    listen: str, state: Path, name: str, init: Path | None, lease: float, save_every: int,
    keep: int, max_examples: int, invite: str, stop_with_stdin: bool, insecure_lan: bool,
    as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Serve a run until it is over. Ctrl-C stops it for now; start again and it goes on."""
    import logging

    from atoll.server.check import check
    from atoll.server.door import beginning
    from atoll.server.server import Server
    from atoll.server.spec import begun, open_spec

    logging.basicConfig(
        level=logging.INFO if console.verbosity() else logging.WARNING,
        stream=sys.stderr,
        format="%(message)s",
    )
    if not name.strip():
        raise UsageError("FL-S108", f"--name {name!r}", "give one, or leave it out")
    if stop_with_stdin:
        orphan.stop_with_stdin()
    wanted = spec_of(
        given, name=name, lease=lease, save_every=save_every, keep=keep, most_examples=max_examples
    )
    behalf: Behalf | None = None
    if invite:
        behalf, manifest = joined(invite, state, name)
        wanted = like_peers(wanted, manifest, spelled_out())
    if not (state / "run.json").exists():
        check(wanted)
    rules = rules_of(given)
    wanted = begun(wanted, rules, init)

    try:
        with beginning(state, wanted.id):
            spec = open_spec(state, wanted, spelled_out())
            slots = {"group": behalf} if behalf is not None else {}
            server = Server.of(
                spec, state, rules, slots=slots, init=init, insecure_lan=insecure_lan
            )
            summary = server.run(
                listen,
                lambda address: _say_served(server, address),
                lambda again: leaving.now(as_json) if again else console.say(STOPPING),
            )
    finally:
        if behalf is not None:
            behalf.stop()
    ended = (
        summary.reason
        or f"stopped for now; go on with: fl-server start --state {shlex.quote(str(state))}"
        + f" --listen {server.address}" * ("listen" in spelled_out())
        + " --insecure-lan" * insecure_lan
        + " --peer INVITE" * bool(invite)  # without it, it would go on alone
    )
    console.emit(summary, as_json, f"{ended}\n{end_line(summary)}")


def end_line(summary: "Summary") -> str:
    """What a run has made; of which version its metrics are, where that is not the last."""
    told = f"{summary.versions} versions from {summary.updates} updates in {summary.seconds:.1f} s"
    more = "".join(f", {k} {v:.4f}" for k, v in sorted(summary.metrics.items()) if k != "examples")
    old = more and summary.best_version != summary.versions
    return told + more + (f" (v{summary.best_version})" if old else "")


def _say_served(server: "Server", address: str) -> None:
    spec = server.spec
    if server.over:
        console.say(f"{spec.name}: this run is over, and stays so; another --state begins one")
        return
    console.say(f"{spec.name}: {spec.strategy} on {spec.model}, serving {address}")
    console.say(f"  clients join with   fl-client start {address}")
    console.say(f"  watch it with       fl-server status --address {address}")
    if not (server.limits.ends() or "rounds=" in spec.strategy):
        console.say("  it has no stop rule: it runs until Ctrl-C (see --versions, --seconds, ...)")
