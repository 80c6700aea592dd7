"""`fl-server simulate`: a run in virtual time, with real training or none."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from atoll.client import partspec
from atoll.protocols import console, leaving, places
from atoll.protocols.errors import UsageError
from atoll.protocols.events import Action, Evaluated, Event, Merged
from atoll.server.options import check_numbers, make_folder, rules_of, run_options, spec_of

if TYPE_CHECKING:
    from atoll.server.crew import Crew
    from atoll.server.simulation import Simulation
    from atoll.server.spec import RunSpec
    from atoll.server.trainers import Trainers
    from atoll.server.training import Engine, Training
    from atoll.server.world import ClientModel

MOST_WORKERS = 1024
MISSED = 5  # exit code: the target was not reached; the run itself went well


@click.command()
@run_options
@click.option("--clients", type=int, default=None, help="How many.  [default: 4]")
@click.option(
    "--speeds", default=None, metavar="SPEC",
    help="speeds:1,1,2,4 (4 is four times as fast as 1), homogeneous, normal:0.3, exp, "
    "lognormal:0.6, trace:FILE.  [default: speeds:1,1,2,4; with --clients, lognormal:0.6]",
)  # fmt: skip
@click.option(
    "--pace", default=0.1, show_default=True,
    help="Mean seconds per step; with speeds:..., those of speed 1.",
)  # fmt: skip
@click.option(
    "--change", type=float, default=None, metavar="P",
    help="Probability, before each order, that a client's speed is drawn anew.",
)  # fmt: skip
@click.option(
    "--bandwidth", default="", metavar="RATE",
    help="Of each client, e.g. 20mbit, 5MB (a second), or down=100mbit,up=20mbit.",
)  # fmt: skip
@click.option(
    "--client-codec", "client_codecs", multiple=True, metavar="NAME=CODEC",
    help="What one client asks for, of what --codec allows, e.g. c0=up=int8,down=fp32; may be "
    "given several times.  [default: the first that is allowed]",
)  # fmt: skip
@click.option(
    "--dropout", default="", metavar="UP[,AWAY]",
    help="Mean seconds until a client's process dies, and until it is back.  [AWAY: 60]",
)  # fmt: skip
@click.option(
    "--lease", default=20.0, show_default=True, help="Seconds until who is away has left."
)
@click.option(
    "--attack", default="", metavar="SPEC",
    help="Of the hostile clients: sign-flip[:TIMES], scale[:TIMES], label-flip.",
)  # fmt: skip
@click.option(
    "--attackers", type=float, default=None, metavar="SHARE",
    help="Of all clients, drawn by --seed.  [default: 0.3 with --attack]",
)  # fmt: skip
@click.option(
    "--partition", default="iid", show_default=True,
    help="How the data is split: iid, dirichlet:0.5, classes:2, quantity:0.5, column:NAME.",
)  # fmt: skip
@click.option("--until", default=600.0, show_default=True, help="Virtual seconds, at most.")
@click.option("--null", is_flag=True, help="Train nothing: only time and decisions.")
@click.option(
    "--model-size", default="", metavar="SIZE", help="With --null and --bandwidth, e.g. 100MB."
)
@click.option("--evaluate-every", default=1, show_default=True, help="Versions.")
@click.option("--threads", default=1, show_default=True, help="Of torch, in each process.")
@click.option(
    "--workers",
    default=1,
    show_default=True,
    help="Processes that train, at most one a client; the hash is the same.",
)
@click.option(
    "--engine", default="processes", show_default=True, metavar="NAME",
    help="What the workers are: processes of this machine, or ray[:ADDRESS], actors of a cluster.",
)  # fmt: skip
@click.option(
    "--out", type=places.Place(), default=None,
    help="Put the history, plots and the newest model there.",
)  # fmt: skip
@console.json_option
def simulate(until: float, out: Path | None, lease: float, as_json: bool, **given: Any) -> int:
    """Try a run in virtual time: the real strategy, real training or none, any number of clients.

    The same command gives the same history, whose hash is printed.
    """
    from atoll.server.check import check, check_clients, strategy_of
    from atoll.server.crowd import clients_of
    from atoll.server.simulator import simulate as run

    check_numbers({"until": until, "lease": lease})
    spec, rules = spec_of(given), rules_of(given)
    if given["null"] and rules.target is not None:
        raise UsageError("FL-S104", "--null evaluates nothing", "drop --target-accuracy or --null")
    if not given["null"]:
        check_clients(spec)
    engine = engine_of(given)
    partspec.parse(given["partition"])
    clients = clients_of(given, spec.seed)
    check(spec, trains=not given["null"], clients=len(clients))
    if out is not None:
        make_folder(out)
    began = time.monotonic()
    with leaving.while_it_begins(as_json):
        learning = None if given["null"] else training_of(spec, clients, given, engine)
    up, down = _sizes(spec, learning, given)
    with leaving.as_interrupted(), Progress(until) as progress, closing_crew(learning):
        found = run(
            strategy_of(spec), clients, until, spec.seed, learning=learning, rules=rules,
            evaluate_every=given["evaluate_every"], lease=lease, update_bytes=up, model_bytes=down,
            history=out is not None, listen=progress.listen,
        )  # fmt: skip
    wall = time.monotonic() - began
    files = {} if out is None else written(out, spec, found, learning)
    told = _told(spec, found, wall, files)
    lines = [f"{found}", f"  took {wall:.1f} s", *(f"  {k:<9} {v}" for k, v in files.items())]
    console.emit(told, as_json, "\n".join(lines))
    return MISSED if told["reached"] is False else 0


# ---- the training ----------------------------------------------------------------------------


def engine_of(given: Mapping[str, Any]) -> "Engine | None":
    """Who trains, as --workers and --engine say; None: this process alone. UsageError FL-S108."""
    name, _, address = given["engine"].partition(":")
    workers, threads = given["workers"], given["threads"]
    if (
        not 1 <= workers <= MOST_WORKERS
        or name not in ("processes", "ray")
        or (address and name != "ray")
    ):
        raise UsageError(
            "FL-S108", f"--workers {workers} --engine {given['engine']}",
            f"give 1 to {MOST_WORKERS} workers, and --engine processes, ray or ray:ADDRESS",
        )  # fmt: skip

    def most(trainers: "Trainers") -> int:
        """More than there are clients would never be given work."""
        return min(int(workers), len(trainers.clients))

    if name == "ray":

        def on_ray(trainers: "Trainers") -> "Crew":
            from atoll.server.rayworkers import RayWorkers

            return RayWorkers(trainers, most(trainers), threads, address or None)

        return on_ray

    def here(trainers: "Trainers") -> "Crew":
        from atoll.server.workers import Workers

        return Workers.of(trainers, most(trainers), threads)

    return here if workers > 1 else None


@contextmanager
def closing_crew(learning: "Training | None") -> Iterator[None]:
    try:
        yield
    finally:
        if learning is not None:
            learning.close()


def training_of(
    spec: "RunSpec",
    clients: "Sequence[ClientModel]",
    given: Mapping[str, Any],
    engine: "Engine | None",
) -> "Training":
    """Every client's trainer, with its shard of the data."""
    import torch

    from atoll.client.local import LocalConfig
    from atoll.server.check import strategy_of
    from atoll.server.secret import sampling_of
    from atoll.server.training import Training

    torch.set_num_threads(given["threads"])
    codecs = {client.name: client.codec for client in clients if client.codec}
    sampling = sampling_of(strategy_of(spec)) if spec.dp else None
    if spec.trainer:
        if given["attack"]:
            raise UsageError(
                "FL-S104", "--attack with --trainer", "attack from within it, or drop it"
            )
        return Training.own(
            spec.trainer, [client.name for client in clients], model=spec.model, data=spec.data,
            seed=spec.seed, aggregation=spec.aggregator, step=spec.outer, up=spec.codec_up,
            down=spec.codec_down, codecs=codecs, buffers=spec.buffers, dp=spec.dp,
            sampling=sampling, local_dp=spec.local_dp, proxy=spec.proxy, engine=engine,
        )  # fmt: skip
    local: dict[str, Any] = dict(spec.local)
    return Training.of(
        [client.name for client in clients], model=spec.model, data=spec.data,
        partition=given["partition"], seed=spec.seed, local=LocalConfig(**local),
        algorithm=spec.algorithm, aggregation=spec.aggregator, step=spec.outer,
        up=spec.codec_up, down=spec.codec_down, codecs=codecs, buffers=spec.buffers, dp=spec.dp,
        sampling=sampling, local_dp=spec.local_dp,
        proxy=spec.proxy,
        attacks={client.name: client.attack for client in clients if client.attack},
        engine=engine,
    )  # fmt: skip


def _sizes(
    spec: "RunSpec", learning: "Training | None", given: Mapping[str, Any]
) -> tuple[int, int]:
    """Bytes of an update and of a model."""
    from atoll.server.crowd import size_of

    if learning is not None:
        return learning.sizes()
    if given["model_size"]:
        size = round(size_of(given["model_size"]))
        return size, size
    if given["bandwidth"]:
        raise UsageError(
            "FL-S108", "--bandwidth without anything to send", "add --model-size, or drop --null"
        )
    return 0, 0


@dataclass
class Progress:
    """Talk on stderr about a simulation that takes long: pass `listen` to it."""

    until: float  # virtual seconds
    _began: float = field(default_factory=time.monotonic)
    _said: float = 0.0
    _version: int = 0
    _accuracy: float | None = None
    _shown: bool = False

    def __enter__(self) -> "Progress":
        self._said = self._began
        self._every = 0.2 if console.interactive() else 10.0
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown and console.interactive():
            click.echo("\r\x1b[K", err=True, nl=False)

    def listen(self, now: float, event: Event, actions: list[Action]) -> None:
        if isinstance(event, Merged):
            self._version = event.version
        elif isinstance(event, Evaluated):
            self._accuracy = event.metrics.get("accuracy")
        moment = time.monotonic()
        if moment - self._said < self._every or moment - self._began < 1.0:
            return
        self._said, self._shown = moment, True
        accuracy = "" if self._accuracy is None else f", accuracy {self._accuracy:.4f}"
        told = f"{now:.0f} of {self.until:g} virtual seconds, v{self._version}{accuracy}"
        if console.interactive():
            click.echo(f"\r\x1b[K{told}", err=True, nl=False)
        else:
            console.say(told)


# ---- what comes of it ------------------------------------------------------------------------


def written(
    out: Path, spec: "RunSpec", found: "Simulation", learning: "Training | None"
) -> dict[str, str]:
    """The files of a simulation, in `out`."""
    from atoll.server import plots
    from atoll.server.history import History, line

    history, title = History.of(found.history), f"{spec.data.split(':')[0]}, {spec.strategy}"
    files = {"history": out / "history.jsonl"}
    files["history"].write_bytes(b"".join(map(line, found.history)))
    files["timeline"] = plots.timeline(history, out / "timeline.png", title)
    if learning is not None:
        target = found.rules.target
        files["accuracy"] = plots.accuracy(history, out / "accuracy.png", target, title)
        if history.taken:
            from atoll.server import strips

            files["shares"] = strips.shares(history, out / "shares.png", title)
        files["model"] = learning.save(out / "model.safetensors")
    return {name: str(path) for name, path in files.items()}


def _told(
    spec: "RunSpec", found: "Simulation", wall: float, files: Mapping[str, str]
) -> dict[str, Any]:
    """The JSON data of the command."""
    target, accuracy = found.rules.target, [value for _, value in found.accuracy]
    reached = found.rules.reached_at
    return {
        "strategy": spec.strategy,
        "seed": spec.seed,
        "reason": found.reason,
        "virtual_s": round(found.seconds, 6),
        "wall_s": round(wall, 3),
        "events": found.events,
        "versions": found.versions,
        "updates": found.updates_used,
        "steps": found.steps_used,
        "mean_staleness": found.mean_staleness,
        "idle": found.idle,
        "bytes_up": found.bytes_up,
        "bytes_down": found.bytes_down,
        "accuracy": accuracy[-1] if accuracy else None,
        "best_accuracy": max(accuracy, default=None),
        "target_accuracy": target,
        "reached": None if target is None else reached is not None,
        "seconds_to_target": reached,
        "epsilon": found.epsilon,
        "hash": found.hash,
        "files": dict(files),
        "clients": [
            {
                "name": name,
                "updates": c.updates,
                "steps": c.steps,
                "idle": c.idle,
                "bytes_up": c.bytes_up,
                "bytes_down": c.bytes_down,
            }
            for name, c in found.clients.items()
        ],
    }
