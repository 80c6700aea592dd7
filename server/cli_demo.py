"""`fl-server demo`: a federation of real processes on this machine, with a live table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from atoll.client import partspec
from atoll.protocols import console, leaving, places, slots
from atoll.protocols.errors import ServerError
from atoll.server.options import check_numbers, data_of, mix_options, private, private_options
from atoll.server.presets import preset_of

if TYPE_CHECKING:
    from atoll.server.demo import DemoSpec
    from atoll.server.spec import RunSpec

MOST_ROWS = 12  # clients that are told of one by one
EXIT_MISSED = 5  # the target was not reached: the run itself went well


def _speeds(context: click.Context, option: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in value.split(",")) if value else ()
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of numbers") from error


@click.command()
@click.option(
    "--clients", default=4, show_default=True, help="How many, each a process of its own."
)
@click.option(
    "--speeds",
    default="",
    callback=_speeds,
    metavar="1,1,2,4",
    help="Relative throughput of each client: 4 is four times as fast as 1.  "
    "[default: 1,1,2,4, repeated]",
)
@click.option(
    "--strategy",
    default="fedcompass",
    show_default=True,
    help="fedcompass, fedavg, fedbuff, with parameters as fedavg:steps=50. "
    "See `fl-server strategies`.",
)
@click.option(
    "--data",
    default="digits",
    show_default=True,
    help="digits, mnist:DIR, cifar10:DIR, text:FILE, csv:FILE, npz:FILE, MODULE:OBJECT.",
)
@click.option(
    "--model", default="",
    help="Or MODULE:OBJECT.  [default: mlp, cnn for images in colour, charlm for text]",
)  # fmt: skip
@click.option(
    "--partition",
    default="iid",
    show_default=True,
    help="iid, dirichlet:0.5, classes:2, quantity:0.5, column:NAME.",
)
@click.option(
    "--target-accuracy", type=float, default=None,
    help="End when reached.  [default: 0.95; of characters 0.3, of topics 0.38]",
)  # fmt: skip
@click.option(
    "--timeout",
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="End then, with exit code 5, if it was not.",
)
@click.option("--seed", default=0, show_default=True, help="Of the first model and of every split.")
@click.option(
    "--out",
    type=places.Place(),
    default=Path("atoll-demo"),
    show_default=True,
    help="Model, history, plots and logs go there.",
)
@click.option(
    "--proxy", default="", metavar="DATA",
    help="What an aggregator learns by.  [default: fedlaw takes 200 training examples]",
)  # fmt: skip
@mix_options
@private_options
@console.json_option
def demo(
    clients: int, speeds: tuple[float, ...], strategy: str, data: str, model: str, trainer: str,
    partition: str, target_accuracy: float | None, timeout: float, seed: int, out: Path,
    aggregator: str, proxy: str, outer: str, algorithm: str, codec: str, lr: float | None,
    as_json: bool, **noise: Any,
) -> None:  # fmt: skip
    """Watch a federation train: one server and several clients, each its own process.

    Ends when the target is reached (exit 0) or the time is up (exit 5), with the model, the
    history and two plots in --out.
    """
    from atoll.protocols.codecspec import parse_ways
    from atoll.protocols.ids import ulid
    from atoll.server.check import wants_proxy
    from atoll.server.demo import Demo, DemoSpec
    from atoll.server.live import Live
    from atoll.server.spec import RunSpec

    outer = outer or preset_of(strategy).outer
    passed = ["--aggregator", aggregator, "--outer", outer, "--local", algorithm, "--codec", codec]
    proxy = proxy or (data if wants_proxy(aggregator) else "")
    passed += ["--proxy", proxy] if proxy else []
    dp, local_dp = private(noise)
    passed += ["--dp", dp] if dp else []
    passed += ["--local-dp", local_dp] if local_dp else []
    passed += ["--lr", str(lr)] if lr is not None else _good_settings(data, algorithm, strategy)
    spec = DemoSpec(
        clients, speeds or tuple((1.0, 1.0, 2.0, 4.0)[i % 4] for i in range(clients)),
        wait_for_all(strategy, clients), data, model or _model_for(data), partition,
        _target_for(data) if target_accuracy is None else target_accuracy, timeout, seed, out,
        tuple(passed), trainer=trainer,
    )  # fmt: skip
    up, down = parse_ways(codec).texts
    wanted = RunSpec(
        ulid(), strategy=spec.strategy, aggregator=aggregator, outer=outer, algorithm=algorithm,
        model=spec.model, data=data_of(data), trainer=trainer, proxy=proxy,
        codec_up=up, codec_down=down, dp=dp, local_dp=local_dp,
    )  # fmt: skip
    _check(spec, wanted, lr)
    console.say(
        f"one server and {clients} clients start on this machine; logs in {out / 'logs'} "
        "(Ctrl-C ends)"
    )
    run = Demo(spec, Live(quiet=as_json), console.say)
    with leaving.as_interrupted():
        told = {**run.run(), "strategy": strategy}
    if not (run.interrupted and as_json):  # one envelope: the error's
        console.emit(told, as_json, _ending(spec, told))
    if run.interrupted:
        raise ServerError("FL-S208", "interrupted", "what was reached lies in " + str(out))
    if not told["reached"]:
        click.get_current_context().exit(EXIT_MISSED)


def _check(spec: "DemoSpec", run: "RunSpec", lr: float | None) -> None:
    """What cannot be is refused before a process is started."""
    from atoll.server.check import check, check_clients
    from atoll.server.rules import Rules

    check_numbers({"lr": lr, "seed": spec.seed})
    Rules(target=spec.target)
    partspec.parse(spec.partition)
    check_clients(run)
    for warning in check(run, clients=spec.clients):
        console.say(f"warning: {warning}")


def wait_for_all(strategy: str, clients: int) -> str:
    """A built-in strategy begins when all clients are there, unless it was told otherwise."""
    name, own, params = slots.split(strategy)
    if own or "min_clients" in params or name not in ("fedavg", "fedcompass", "diloco"):
        return strategy
    return f"{strategy}{',' if params else ':'}min_clients={clients}"


def _model_for(data: str) -> str:
    kind = data.split(":")[0]
    return {"text": "charlm", "topics": "charlm", "cifar10": "cnn"}.get(kind, "mlp")


def _target_for(data: str) -> float:
    return {"text": 0.3, "topics": 0.38}.get(data.split(":")[0], 0.95)


def _good_settings(data: str, algorithm: str, strategy: str) -> list[str]:
    """For digits plain SGD at 0.1 ends half a point above 95 %: momentum makes it two. A method
    that brings its own momentum wants plain steps, larger ones. A small transformer under AdamW
    takes ten times the steps of a large one."""
    if preset_of(strategy).local.get("optimizer") == "adamw":
        return ["--lr", "0.003"]
    if data != "digits":
        return []
    from atoll.server import catalogue

    if "plain_sgd" in catalogue.facts_of("local algorithm", algorithm).needs:
        return ["--lr", "0.3"]
    return ["--lr", "0.1", "--local-momentum", "0.9"]


def _per_client(clients: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each did and what travelled for it; of a crowd the sums are enough."""
    if len(clients) > MOST_ROWS:
        return []
    width = max(len(c["name"]) for c in clients)
    return [
        f"  {c['name']:<{width}}  {c['updates']:5} updates {c['steps']:7} steps  "
        f"{console.size(c['bytes_up']):>8} up {console.size(c['bytes_down']):>8} down"
        for c in clients
    ]


def _ending(spec: "DemoSpec", told: dict[str, Any]) -> str:
    files = told["files"]
    accuracy = told["accuracy"]
    reached = (
        f"reached {spec.target:g} accuracy after {told['seconds_to_target']:.1f} s of training"
        if told["reached"]
        else f"did not reach {spec.target:g} accuracy"
    )
    best = "" if accuracy is None else f", best {accuracy:.4f}"
    paid = told["epsilon"]
    lines = [
        f"{reached} ({told['versions']} versions{best})",
        f"{console.size(told['bytes_up'])} up, {console.size(told['bytes_down'])} down"
        + ("" if paid is None else f", epsilon {paid:.4g}"),
        *_per_client(told["clients"]),
        "",
    ]
    lines += [f"  {name:<9} {path}" for name, path in files.items()]
    other = "fedavg:steps=50" if spec.strategy.startswith("fedcompass") else "fedcompass"
    hints = (
        (f"fl-server demo --strategy {other}", "the same clients, scheduled differently"),
        ("fl-server demo --partition dirichlet:0.3", "clients with unlike data"),
        ("fl-server start", "a federation of your own: see README.md"),
    )
    width = max(len(command) for command, _ in hints)
    lines += ["", "try next", *(f"  {command:<{width}}  {what}" for command, what in hints)]
    return "\n".join(lines)
