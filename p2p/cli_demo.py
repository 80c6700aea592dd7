"""`fl-peer demo`: a swarm of real processes on this machine, one comes late and one is killed."""

from pathlib import Path
from typing import Any

import click

from atoll.protocols import console, leaving, places
from atoll.protocols.errors import PeerError

EXIT_MISSED = 5  # not all of it happened in time: what did went well


@click.command()
@click.option(
    "--peers", default=4, show_default=True,
    help="Processes: one founds the run, one joins late, one is killed.",
)  # fmt: skip
@click.option("--rounds", default=40, show_default=True, help="Averages until it ends.")
@click.option(
    "--steps", default=30, show_default=True, help="Local steps between two averages (H)."
)
@click.option(
    "--model", default="charlm:width=64,depth=2", show_default=True,
    help="A built-in name with parameters, or MODULE:OBJECT.",
)  # fmt: skip
@click.option(
    "--data", default="topics:context=64", show_default=True,
    help="topics (comes with Python), text:FILE, digits, ... or MODULE:OBJECT.",
)  # fmt: skip
@click.option("--lr", default=6e-3, show_default=True, help="AdamW's step size.")
@click.option(
    "--codec", default="fp32", show_default=True,
    help="How averages travel: int8, ...: see `fl-server codecs`.",
)  # fmt: skip
@click.option(
    "--timeout", default=120.0, show_default=True, metavar="SECONDS",
    help="End by then, with exit code 5 if it was not over.",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(0, (1 << 53) - 1), default=0, show_default=True,
    help="Of the first model and the batches.",
)  # fmt: skip
@click.option(
    "--out", type=places.Place(), default=Path("atoll-swarm"),
    show_default=True, help="The model, the peers' directories and logs go there.",
)  # fmt: skip
@console.json_option
def demo(
    peers: int, rounds: int, steps: int, model: str, data: str, lr: float, codec: str,
    timeout: float, seed: int, out: Path, as_json: bool,
) -> None:  # fmt: skip
    """Watch peers train without a server: one joins late, one is killed, the model never forks.

    Ends when those who live have made all rounds (exit 0) or the time is up (exit 5).
    """
    from atoll.p2p.demo import Swarm, SwarmSpec
    from atoll.p2p.demo_view import Show

    if rounds < 1:
        raise click.BadParameter(f"{rounds}: give at least 1", param_hint="--rounds")
    spec = SwarmSpec(peers, rounds, steps, model, data, lr, codec, seed, timeout, out)
    swarm = Swarm(spec, Show(quiet=as_json), console.say)
    console.say(f"{peers} peers start on this machine; logs in {swarm.logs} (Ctrl-C ends)")
    with leaving.as_interrupted():
        told = swarm.run()
    if swarm.interrupted:
        raise PeerError("FL-S208", "interrupted", f"what was reached lies in {out}")
    console.emit(told, as_json, ending(told))
    if not told["reached"]:
        click.get_current_context().exit(EXIT_MISSED)


def ending(told: dict[str, Any]) -> str:
    first, last = told["loss_first"], told["loss_last"]
    loss = "" if first is None or last is None else f", loss {first:.4f} to {last:.4f}"
    came, went = told["joined_at_round"], told["killed_at_round"]
    late = "nobody joined late" if came is None else f"one joined late, in round {came}"
    killed = "nobody was killed" if went is None else f"one was killed after round {went}"
    same = f"one model: {told['digest'][:16]}" if told["digests_equal"] else "different models"
    lines = [
        f"{told['rounds']} rounds of {told['peers']} peers in {told['elapsed_s']:.1f} s{loss}",
        f"{late}; {killed}",
        f"{told['forks']} forks in {told['rounds_compared']} rounds compared; at the end {same}",
        f"{console.size(told['bytes_up'])} up, {console.size(told['bytes_down'])} down",
        "",
    ]
    if told["sample"]:
        lines += ["what it writes now:", console.clean_lines(told["sample"]), ""]
    lines += [f"  {name:<6} {path}" for name, path in told["files"].items()]
    lines += ["", "try next", "  fl-peer init   found a run that other machines join"]
    return "\n".join(lines)
