"""fl-client: take part in a run, measure this machine, try a trainer before it takes part."""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from atoll.client import partspec
from atoll.protocols import console, leaving, orphan, places, poller
from atoll.protocols.address import split as split_address
from atoll.protocols.errors import ClientError, UsageError
from atoll.protocols.ids import machine_name

if TYPE_CHECKING:
    from atoll.client.client import Client
    from atoll.client.training import Report


@click.group(name="fl-client")
@click.version_option(package_name="atoll", prog_name="fl-client", message="%(prog)s %(version)s")
def cli() -> None:
    """Train a shared model on this machine's data."""


def main() -> NoReturn:
    poller.read_where_we_wait()
    code = console.run(cli)
    leaving.at_once()  # the end waits for the step that a trainer is in
    sys.exit(code)


def _shard(context: click.Context, option: click.Parameter, value: str) -> tuple[int, int]:
    index, slash, count = value.partition("/")
    if slash and index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return int(index), int(count)
    raise click.BadParameter(f"{value!r} is not I/N with I < N, e.g. 0/4")


FIRST = 600.0  # seconds to wait for a server that has not been there yet

_MODEL = click.option("--model", default="", help="Built-in name or MODULE:OBJECT.")
_DATA = click.option(
    "--data", default="", callback=console.not_empty,
    help="digits, mnist:DIR, csv:FILE, ... or MODULE:OBJECT.",
)  # fmt: skip
_TRAINER = click.option("--trainer", default="", help="Your own Trainer as MODULE:OBJECT.")
_DEVICE = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda:0, mps."
)


@cli.command()
@click.argument("address")
@click.option(
    "--name", default="", callback=console.not_empty,
    help="Unique in the run: lower case letters, digits, - . _  [default: this machine's]",
)  # fmt: skip
@click.option(
    "--dir",
    "folder",
    type=places.Place(),
    default=None,
    help="Keeps finished work over restarts.  [default: atoll-client-NAME]",
)
@_MODEL
@_DATA
@_TRAINER
@click.option(
    "--partition",
    default="iid",
    show_default=True,
    help="How DATA is split: iid, dirichlet:0.5, classes:2, quantity:0.5, column:NAME.",
)
@click.option(
    "--shard",
    default="0/1",
    show_default=True,
    callback=_shard,
    metavar="I/N",
    help="Which part of the split is this client's.",
)
@_DEVICE
@click.option("--bench", is_flag=True, help="Measure the speed first, for FedCompass.")
@click.option(
    "--patience",
    type=float,
    default=None,
    metavar="SECONDS",
    help=f"Give up after so long without a server.  [default: {FIRST:.0f} until it is in the run "
    "for the first time, then never]",
)
@click.option(
    "--codec", default="", metavar="CODEC",
    help="Ask for one that the run allows: int8, or up=int8,down=fp32.  [default: the run's]",
)  # fmt: skip
@click.option(
    "--local-dp", default="", metavar="SPEC", callback=console.not_empty,
    help="Noise of this client's own, whatever the server asks for: clip=0.3,noise=2.",
)  # fmt: skip
@click.option(
    "--validate", type=float, default=None, metavar="SHARE",
    help="Of the examples, held out to judge models in a merge; 0: not.  [default: 0.1, where the "
    "run asks for it]",
)  # fmt: skip
@click.option("--stop-with-stdin", is_flag=True, hidden=True)
@click.option("--sleep-per-step", type=float, default=0.0, hidden=True)
@console.json_option
def start(
    address: str, name: str, folder: Path | None, model: str, data: str, trainer: str,
    partition: str, shard: tuple[int, int], device: str, bench: bool, patience: float | None,
    codec: str, local_dp: str, validate: float | None, stop_with_stdin: bool,
    sleep_per_step: float, as_json: bool,
) -> None:  # fmt: skip
    """Take part in the run at ADDRESS until it is over.

    Reconnects by itself; killed and started again it goes on, and delivers what it had finished.
    """
    import logging

    if stop_with_stdin:
        orphan.stop_with_stdin()
    split_address(address)
    _check_seconds("--patience", patience)
    partspec.parse(partition)
    _check_share(validate, local_dp)
    level = logging.DEBUG if console.verbosity() > 1 else logging.INFO
    logging.basicConfig(
        level=level if console.verbosity() else logging.WARNING,
        stream=sys.stderr,
        format="%(message)s",
    )
    logging.getLogger("atoll.client.client").setLevel(level)  # joined, lost, back: always told
    name = _client_name(name or machine_name())
    console.say(f"{name}: joining {address} (Ctrl-C leaves)")
    with leaving.while_it_begins(as_json):
        import torch

        from atoll.client.bench import bench as measure
        from atoll.client.client import Client
        from atoll.client.localdp import local_dp as own_noise
        from atoll.client.options import Options, look, maker
        from atoll.protocols import loops

        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
        share = 0.0 if local_dp and not trainer else validate  # it would never be asked
        parts = name, model, data, trainer, partition, shard, device, sleep_per_step, share
        options = Options(*parts)
        look(options)
        folder = folder or Path(f"atoll-client-{name}")
        client = Client(
            address,
            maker(options, folder),
            name=name,
            folder=folder,
            seconds_per_step=(lambda made: measure(made).seconds_per_step) if bench else None,
            patience_seconds=float("inf") if patience is None else patience,
            first_seconds=FIRST if patience is None else patience,
            codec=codec,
            private=own_noise(local_dp) if local_dp else None,
        )
        report = loops.run(_until_left(client, as_json))
    console.emit(
        {"name": name, **vars(report)},
        as_json,
        f"{report.reason}: {report.orders} orders, {report.steps} local steps, "
        f"{report.used} updates used, {report.discarded} discarded",
    )


async def _until_left(client: "Client", as_json: bool) -> "Report":
    """Ctrl-C and SIGTERM leave with a goodbye: the run need not wait for a lease to end. Ctrl-C
    again does not wait for the step that the trainer is in."""
    import asyncio

    told = False

    def interrupted() -> None:
        nonlocal told
        if told:
            leaving.now(as_json)
        told = True
        console.say("leaving (Ctrl-C again ends at once)")
        client.stop()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, interrupted)
    loop.add_signal_handler(signal.SIGTERM, client.stop)
    return await client.serve()


@cli.command()
@_MODEL
@_DATA
@_TRAINER
@_DEVICE
@click.option("--seconds", default=2.0, show_default=True, help="How long to measure.")
@console.json_option
def bench(model: str, data: str, trainer: str, device: str, seconds: float, as_json: bool) -> None:
    """Measure this machine: steps per second, and how fast a model is packed."""
    _check_seconds("--seconds", seconds)
    with leaving.while_it_begins(as_json):
        from atoll.client.bench import bench as measure

        made = _offline(model, data, trainer, device)
    found = measure(made, seconds)
    console.emit(
        found,
        as_json,
        f"{1 / found.seconds_per_step:.0f} steps/s, {found.examples_per_second:.0f} examples/s on "
        f"{found.device}; packs {found.encode_mb_s:.0f} MB/s",
    )


@cli.command()
@_MODEL
@_DATA
@_TRAINER
@_DEVICE
@click.option(
    "--run",
    "address",
    default="",
    metavar="ADDRESS",
    help="Compare with this server's run.",
)
@console.json_option
def test(model: str, data: str, trainer: str, device: str, address: str, as_json: bool) -> None:
    """Try a model, data or trainer before it takes part: two steps, then an evaluation."""
    with leaving.while_it_begins(as_json):
        from atoll.client.bench import check

    manifest = None
    if address:
        split_address(address)
        from atoll.client.inspect import run_info

        info = run_info(address)
        manifest, model, data = info.manifest, model or info.model, data or info.data
    found = check(_offline(model, data, trainer, device), manifest)
    console.emit(
        found,
        as_json,
        f"works: {found.tensors} tensors, {found.parameters} parameters, loss "
        f"{found.loss if found.loss is None else round(found.loss, 4)} after {found.steps} steps",
    )


@cli.command()
@click.argument("invite", required=False)
@console.json_option
def join(invite: str | None, as_json: bool) -> None:
    """Enrol this machine with an invite (comes with enrolment, later)."""
    raise ClientError(
        "FL-C106",
        "not built yet: `join` will enrol this machine with a certificate of its own",
        "until then: fl-client start ADDRESS",
    )


def _offline(model: str, data: str, trainer: str, device: str):  # type: ignore[no-untyped-def]
    from atoll.client.local import LocalConfig
    from atoll.client.options import Options, look, own_trainer, torch_trainer

    options = Options("local", model, data, trainer, device=device)
    look(options)
    if trainer:
        return own_trainer(trainer, "local")
    return torch_trainer(options, model or "mlp", data or "digits", LocalConfig(device=device))


def _check_share(validate: float | None, local_dp: str) -> None:
    """UsageError FL-S108."""
    if validate is not None and not 0 <= validate <= 0.5:
        raise UsageError("FL-S108", f"--validate {validate:g}", "give a share from 0 to 0.5")
    if validate and local_dp:
        raise UsageError(
            "FL-S108",
            f"--validate {validate:g} beside --local-dp {local_dp}",
            "a gradient on what is held out carries no noise: leave one of them out",
        )


def _check_seconds(option: str, seconds: float | None) -> None:
    if seconds is not None and not 0 < seconds < float("inf"):
        raise UsageError("FL-S108", f"{option} {seconds}", "give seconds above 0")


def _client_name(name: str) -> str:
    from atoll.protocols.ids import CLIENT_NAME

    if not CLIENT_NAME.fullmatch(name):
        raise UsageError(
            "FL-S108",
            f"client name {name[:80]!r}",
            "use lower case letters, digits, '.', '_' and '-', at most 63, a letter or digit first",
        )
    return name
