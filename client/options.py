"""From a client's command line to its trainer. Imports torch, so only when a command runs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from atoll.client.data import Data, find_data, load_data
from atoll.client.heldout import held_share
from atoll.client.local import LocalConfig, TorchTrainer
from atoll.client.models import BUILTIN, takes
from atoll.client.specs import make_trainer
from atoll.client.trainer import Trainer
from atoll.protocols import slots
from atoll.protocols.errors import ClientError, DataError, UsageError
from atoll.protocols.runinfo import RunInfo


@dataclass(frozen=True)
class Options:
    """What a user gave; empty: take the run's."""

    name: str
    model: str = ""
    data: str = ""
    trainer: str = ""
    partition: str = "iid"
    shard: tuple[int, int] = (0, 1)
    device: str = "auto"
    slowdown: float = 0.0  # seconds slept after each step
    validate: float | None = None  # share of its examples to judge models by; None: the run's wish


def look(options: Options) -> None:
    """What is named and not there, or of no use, is told before a server is waited for.

    A user's modules are imported, nothing is made or read. UsageError FL-S101, FL-S102, FL-S103;
    DataError FL-D101, FL-D103.
    """
    if options.trainer:
        slots.find("trainer", options.trainer, {})
        _alone(options)
        return
    if options.model:
        slots.find("model", options.model, BUILTIN)
    if options.data:
        find_data(options.data)


def _alone(options: Options) -> None:
    """A trainer of one's own brings what it needs: what would not be looked at is refused."""
    usual = Options(options.name)
    brings = "brings its own model and data"
    why = dict.fromkeys(("model", "data", "partition", "device"), brings)
    why["validate"] = "judges models where it has a `validator`, and only there"
    for part, does in why.items():
        given = getattr(options, part)
        if given != getattr(usual, part):
            raise UsageError(
                "FL-S102",
                f"--{part} {given} beside --trainer {options.trainer}",
                f"a trainer {does}: leave --{part} out",
            )


def local_config(given: dict[str, bool | int | float | str], device: str) -> LocalConfig:
    """The run's local configuration on this client's device. UsageError FL-S102."""
    try:
        return replace(LocalConfig(**given), device=device)  # type: ignore[arg-type]
    except TypeError as error:
        raise UsageError("FL-S102", f"local configuration {given}: {error}", "see docs") from error


def maker(options: Options, folder: Path | None = None) -> Callable[[RunInfo], Trainer]:
    """Makes the trainer once the run is known: the client's own choices go before the run's.

    `folder`: the client's, which knows what it held out in its former lives.
    """

    def make(run: RunInfo) -> Trainer:
        if options.trainer:
            return own_trainer(options.trainer, options.name, options.shard, run.seed)
        model = options.model or _installed(run.model)
        data = options.data or _bundled(run.data)
        shard = "/".join(map(str, options.shard))
        of = options.name, data, options.partition, shard, str(run.seed)
        return torch_trainer(
            options,
            model=model,
            data=data,
            local=local_config(run.local, options.device),
            algorithm=run.algorithm,
            seed=run.seed,
            validate=held_share(folder, options.validate, run.validate, run.id, of),
        )

    return make


def torch_trainer(
    options: Options,
    model: str,
    data: str,
    local: LocalConfig,
    algorithm: str = "plain",
    seed: int = 0,
    validate: float = 0.0,
) -> TorchTrainer:
    loaded: Data = load_data(data)
    return make_trainer(
        model, loaded, options.partition, options.shard, seed, local, algorithm, options.name,
        options.slowdown, validate,
    )  # fmt: skip


def own_trainer(
    spec: str, client: str = "client", shard: tuple[int, int] = (0, 1), seed: int = 0
) -> Trainer:
    """A user's `module:object`: a Trainer, or something that makes one.

    What makes one is told `client`, `shard` and `seed` where it has parameters of these names.
    """
    found = slots.find("trainer", spec, {})
    made = found
    if isinstance(found, type) or not hasattr(found, "train"):
        if not callable(found):
            raise UsageError(
                "FL-S102",
                f"trainer {spec!r} is no Trainer",
                "give it load, train and evaluate: see atoll.client.Trainer",
            )
        told = {"client": client, "shard": shard, "seed": seed}
        known = {name: value for name, value in told.items() if takes(found, name)}
        made = slots.call("trainer", spec, found, {**known, **slots.split(spec)[2]})
    missing = [name for name in ("load", "train", "evaluate") if not hasattr(made, name)]
    if missing:
        raise UsageError(
            "FL-S102",
            f"trainer {spec!r} has no {missing[0]}()",
            "a Trainer has load, train and evaluate: see atoll.client.Trainer",
        )
    return made  # type: ignore[return-value]


def _installed(model: str) -> str:
    """The run's model, where it is built in: a server's word never imports code here."""
    if slots.split(model)[1] or slots.split(model)[0] not in BUILTIN:
        raise ClientError(
            "FL-C107",
            f"the run's model is {model!r}, which is not built in",
            "give this client the same code: --model MODULE:OBJECT",
        )
    return model


def _bundled(data: str) -> str:
    """The run's data, where everybody has it: a client trains on its own otherwise."""
    if data.split(":")[0] in ("digits", "synthetic", "topics"):
        return data
    raise DataError(
        "FL-D103", "this client was given no data of its own", "add --data, e.g. --data csv:FILE"
    )
