"""`fl-peer init`, `join`, `start`: found a run, take part in it, and show how it goes."""

import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from atoll.p2p import folder as folders
from atoll.p2p import ports
from atoll.p2p.line import Line
from atoll.protocols import console, orphan, places
from atoll.protocols.errors import AtollError, PeerError, UsageError
from atoll.protocols.ids import machine_name

if TYPE_CHECKING:
    from atoll.p2p.peer import Peer, PeerResult

F = TypeVar("F", bound=Callable[..., Any])

_FOLDER = click.option(
    "--folder",
    type=places.Place(),
    default=None,
    help="What this peer keeps.  [default: atoll-peer, or atoll-peer-2, ... where it is taken]",
)


def _printable(context: click.Context, option: click.Parameter, name: str) -> str:
    """It stands in a table of others, who take no other."""
    if not name.isprintable():
        raise click.BadParameter(f"{name!r} is not printable")
    return console.not_empty(context, option, name)


def _machine(command: F) -> F:
    """Options of how this machine takes part."""
    for option in (
        click.option("--stop-with-stdin", is_flag=True, hidden=True, help="With the parent."),
        click.option("--speed-factor", default=1.0, hidden=True, help="Play a slower machine."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:0, mps."),
        click.option(
            "--no-listen", is_flag=True,
            help="Nobody can connect to this machine: it trains, and reduces nothing for others.",
        ),
        click.option(
            "--host", default="0.0.0.0", show_default=True, metavar="ADDRESS",
            help="Listen there alone, e.g. 127.0.0.1 to try it on one machine.",
        ),
        click.option(
            "--port", type=click.IntRange(0, 65535), default=None,
            help=f"TCP port for other peers.  [default: {ports.USUAL} where it is free, else any]",
        ),
        click.option(
            "--name", default="", callback=_printable,
            help="This peer's, for people.  [default: the host's]",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.option("--run", "run_name", default="atoll", show_default=True, help="The run's name.")
@click.option(
    "--model", default="charlm", show_default=True,
    help="A built-in name, with parameters as charlm:width=64, or MODULE:OBJECT.",
)  # fmt: skip
@click.option(
    "--data", default="topics", show_default=True,
    help="Of every peer: topics (comes with Python), text:FILE, digits, ... or MODULE:OBJECT.",
)  # fmt: skip
@click.option(
    "--steps", "local_steps", type=click.IntRange(1), default=50, show_default=True, metavar="H",
    help="Local steps between two averages (H), of a peer as fast as this one.",
)  # fmt: skip
@click.option(
    "--batch", type=click.IntRange(1), default=16, show_default=True, metavar="EXAMPLES",
    help="Examples in a step.",
)  # fmt: skip
@click.option("--lr", default=1e-3, show_default=True, help="AdamW's step size.")
@click.option(
    "--outer", default="nesterov:lr=0.7,momentum=0.9", show_default=True,
    help="The step taken with an average: see `fl-server outers`.",
)  # fmt: skip
@click.option(
    "--codec", default="fp32", show_default=True,
    help="How averages travel: int8, or up=topk:0.01+ef,down=int8: see `fl-server codecs`.",
)  # fmt: skip
@click.option(
    "--rounds", type=click.IntRange(0), default=0, metavar="AVERAGES",
    help="Averages until it ends.  [default: no end]",
)  # fmt: skip
@click.option(
    "--first", type=click.IntRange(1), default=1, show_default=True, metavar="PEERS",
    help="Members that the first round waits for.",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(0, (1 << 53) - 1), default=0, show_default=True,
    help="Of the first model and the batches.",
)  # fmt: skip
@click.option("--no-start", is_flag=True, help="Found it only; `fl-peer start` trains.")
@_FOLDER
@_machine
@console.json_option
def init(
    run_name: str, model: str, data: str, local_steps: int, batch: int, lr: float, outer: str,
    codec: str, rounds: int, first: int, seed: int, no_start: bool, folder: Path | None, name: str,
    port: int | None, host: str, no_listen: bool, device: str, speed_factor: float,
    stop_with_stdin: bool, as_json: bool,
) -> None:  # fmt: skip
    """Found a run, print the invite for others, and train as its first peer."""
    listen = _listen(port, host, no_listen)
    if no_listen:
        raise UsageError(
            "FL-S104", "--no-listen for the founder", "the first peer of a run must be reachable"
        )
    place = folders.new(folder)
    from dataclasses import replace

    from atoll.p2p.founding import Wish, found
    from atoll.p2p.invite import ADDRESSES, write
    from atoll.protocols.loops import run

    _begin(stop_with_stdin)
    wish = Wish(run_name, model, data, seed, local_steps, batch, lr, outer, codec, rounds, first)
    console.say(f"founding {run_name}: {model} on {data}, {local_steps} steps a round …")
    papers, paper = run(
        found(
            wish, place, listen, name=name or machine_name(), device=device,
            speed_factor=speed_factor,
        )
    )  # fmt: skip
    text = write(papers)
    told = {
        "run": paper.run, "name": paper.name, "invite": text, "folder": str(place),
        "addresses": papers.addresses, "manifest": papers.manifest, "elements": paper.elements,
        "speed": paper.speed,
    }  # fmt: skip
    if no_start:
        start_it = f"fl-peer start {place}"
        console.emit(told, as_json, f"{text}\n")
        console.say(f"founded in {place}; train with   {start_it}")
        return

    def up(status: Mapping[str, Any]) -> None:  # not before it can be joined, and there
        addresses = tuple(status.get("addresses") or papers.addresses)[:ADDRESSES]
        told["addresses"] = addresses
        told["invite"] = write(replace(papers, addresses=addresses))
        if not as_json:
            console.emit(told, as_json, f"\nfl-peer join {told['invite']}\n")
        console.say("run that line on other machines (whoever has it may take part; Ctrl-C leaves)")

    _take_part(place, as_json, founded=told, up=up)


@click.command()
@click.argument("invite")
@_FOLDER
@_machine
@console.json_option
def join(
    invite: str, folder: Path | None, name: str, port: int | None, host: str, no_listen: bool,
    device: str, speed_factor: float, stop_with_stdin: bool, as_json: bool,
) -> None:  # fmt: skip
    """Take part in the run of INVITE until it ends; `-` reads the invite from standard input."""
    from atoll.p2p.daemon import LOOKING
    from atoll.p2p.invite import read, typed

    text = typed(sys.stdin) if invite == "-" else invite
    papers = read(text)
    listen = _listen(port, host, no_listen)
    place = folders.for_run(folder, papers.run)
    folders.free(place)  # before its papers are written anew
    fresh = folders.empty(place)
    _begin(stop_with_stdin)
    about = folders.About(
        "".join(text.split()), name or machine_name(), listen, device, speed_factor
    )
    folders.write(place, about)
    places = ", ".join(address.partition("/p2p/")[0] for address in papers.addresses)
    console.say(f"looking for a member of the run at {places}, for {LOOKING:g} s at most …")
    try:
        _take_part(place, as_json)
    except BaseException as error:
        another = isinstance(error, PeerError) and error.code == "FL-P406"  # it is that one's now
        if fresh and not another and not (place / folders.SIGNED).exists():  # never in the run
            folders.withdraw(place)
        raise


@click.command()
@click.argument("folder", type=places.Place(), default=folders.DEFAULT)
@click.option("--stop-with-stdin", is_flag=True, hidden=True, help="With the parent.")
@console.json_option
def start(folder: Path, stop_with_stdin: bool, as_json: bool) -> None:
    """Go on as the peer in FOLDER, with what it remembers."""
    folders.read(folder)
    folders.free(folder)
    _begin(stop_with_stdin)
    _take_part(folder, as_json)


def _begin(stop_with_stdin: bool) -> None:
    import logging

    level = logging.INFO if console.verbosity() else logging.WARNING
    logging.basicConfig(level=level, stream=sys.stderr)
    if not console.verbosity():  # tasks of hivemind's that end when a daemon does
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    if stop_with_stdin:
        orphan.stop_with_stdin()


def _listen(port: int | None, host: str, no_listen: bool) -> tuple[str, ...]:
    """Multiaddrs of this machine."""
    import ipaddress

    if no_listen:
        return ()
    try:
        kind = f"ip{ipaddress.ip_address(host).version}"
    except ValueError as error:
        raise UsageError(
            "FL-S108", f"--host {host}", "give an address of this machine, as 192.168.1.20"
        ) from error
    if port is None:
        port = ports.USUAL if ports.free(host, ports.USUAL) else 0
    ports.check(host, port)
    return (f"/{kind}/{host}/tcp/{port}",)


def _take_part(
    place: Path,
    as_json: bool,
    founded: dict[str, Any] | None = None,
    up: Callable[[Mapping[str, Any]], None] = lambda status: None,
) -> None:
    """Until the run's end, or until it is left. `up` is called once, when it is there,
    with its first status."""
    from atoll.p2p.invite import read
    from atoll.p2p.peer import Peer
    from atoll.protocols.loops import run

    about = folders.read(place)
    with Line(quiet=as_json, up=up) as line:
        peer = Peer(
            place, read(about.invite), folders.signed(place), name=about.name, listen=about.listen,
            speed_factor=about.speed_factor, device=about.device, watch=line.show,
        )  # fmt: skip
        result = run(_until_left(peer, line))
    saved, sample = _save(peer, place)
    if result is None:
        told: dict[str, Any] = {**(founded or {}), "folder": str(place), "left": False}
        human = f"stopped, it was alone; go on with   fl-peer start {place}"
    else:
        told = {**(founded or {}), **vars(result), "folder": str(place), "left": line.leaving}
        human = _ending(result, line.leaving)
    if saved is not None:
        told["model"] = str(saved)
        human += f"\nmodel  {saved}"
    if sample:
        told["sample"] = sample
        human += f"\n\nwhat it writes now:\n{console.clean_lines(sample)}"
    console.emit(told, as_json, human)


async def _until_left(peer: "Peer", line: Line) -> "PeerResult | None":
    """None where it was told to stop and there was nobody to say goodbye to: it keeps what it
    remembers. The second signal ends it at once."""
    import asyncio

    loop, running = asyncio.get_running_loop(), asyncio.current_task()
    working = asyncio.create_task(peer.run())

    def stop() -> None:
        if line.leaving:
            assert running is not None
            running.cancel()
        line.leave()
        if line.alone:
            working.cancel()
        else:
            peer.leave()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        return await working
    except asyncio.CancelledError:
        if running is not None and running.cancelling():
            await asyncio.gather(working, return_exceptions=True)
            raise AtollError("FL-S208", "interrupted", "it comes back as itself") from None
        return None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _save(peer: "Peer", place: Path) -> tuple[Path | None, str]:
    """The model as it is now, by names, and what it writes; None where there is none yet."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from atoll.p2p.work import Work
    from atoll.protocols.tensors import unflatten

    work = getattr(peer, "_work", None)
    if not isinstance(work, Work):
        return None, ""
    tensors = unflatten(work.manifest, "trainable", work.engine.state.anchor)
    path, beside = place / folders.MODEL, place / f"{folders.MODEL}.tmp"
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        raise PeerError(
            "FL-P405",
            f"{path} cannot be written: {error}",
            f"make room; then fl-peer start {place}",
        ) from error
    return path, work.sample(200)


def _ending(result: "PeerResult", left: bool) -> str:
    first, last = result.loss_first, result.loss_last
    loss = "" if first is None or last is None else f", loss {first:.4f} to {last:.4f}"
    return (
        f"{'left' if left else 'the run is over'} after {result.rounds} rounds, "
        f"{result.joined} with this peer's work{loss}; "
        f"{console.size(result.bytes_out)} up, {console.size(result.bytes_in)} down"
    )
