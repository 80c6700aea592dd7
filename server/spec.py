"""What a run is: everything that was decided before it began, kept as `run.json`.

The same spec drives a demo, a simulation and a server, and a restarted server reads it back.
"""

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from atoll.protocols import durable, state
from atoll.protocols.errors import ServerError
from atoll.server.claim import refuse_foreign
from atoll.server.door import locked
from atoll.server.rules import LIMITS, Rules

STRATEGIES: Mapping[str, str] = {
    "fedavg": "atoll.aggregation.fedavg:FedAvg",
    "fedbuff": "atoll.aggregation.fedbuff:FedBuff",
    "fedasync": "atoll.aggregation.fedbuff:fedasync",
    "fedcompass": "atoll.aggregation.fedcompass:FedCompass",
    "diloco": "atoll.aggregation.diloco:DiLoCo",
    "dp-fedavg": "atoll.aggregation.dp_fedavg:DpFedAvg",
}

Params = dict[str, bool | int | float | str]


@dataclass(frozen=True)
class RunSpec:
    """Slots are named as on the command line: a built-in name, an entry point, module:object."""

    id: str  # ULID
    name: str = "run"
    strategy: str = "fedcompass"
    aggregator: str = "mean"
    outer: str = "sgd"
    algorithm: str = "plain"  # local algorithm
    model: str = "mlp"
    data: str = "digits"  # the server's test set, empty: none; clients bring their own
    trainer: str = ""  # module:object, evaluates in place of the model; clients bring their own
    proxy: str = ""  # what an aggregator learns by, apart from the test set
    codec_up: str = "fp32"
    codec_down: str = "fp32"
    buffers: str = "weighted_mean"
    dp: str = ""  # central differential privacy, e.g. "clip=0.3,noise=1"; empty: none
    local_dp: str = ""  # of the clients' own noise
    local: Params = field(default_factory=dict)  # of LocalConfig
    seed: int = 0
    lease: float = 20.0  # seconds
    save_every: int = 1  # versions; those between are made again from kept updates after a crash
    most_examples: int = 0  # that a client may claim to hold, its weight; 0: no bound
    evaluate_every: int = 1  # versions; 0: never
    keep: int = 5  # newest versions on disk, besides the first and the best
    limits: Params = field(default_factory=dict)  # of Rules, as it began; the journal has today's
    init: str = ""  # file of the first version's values; empty: drawn by the seed

    def for_clients(self) -> str:
        """What a client is told of the run, as JSON."""
        told = (
            "id",
            "name",
            "model",
            "data",
            "algorithm",
            "local",
            "seed",
            "codec_up",
            "codec_down",
            "local_dp",
        )
        whole = asdict(self)
        return json.dumps({key: whole[key] for key in told})

    def write(self, path: Path) -> None:
        """Whole or not at all, also after a power cut. ServerError FL-S203."""
        beside = path.with_name(path.name + ".tmp")
        try:
            beside.write_text(json.dumps(state.dump(self), indent=1) + "\n")
            durable.place(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise ServerError(
                "FL-S203",
                f"{path} cannot be written: {error.strerror}",
                "free space on its disk and start again",
            ) from error

    @classmethod
    def read(cls, path: Path) -> "RunSpec":
        """Raises ServerError FL-S206 where the file is not a run's."""
        try:
            return state.loads(cls, path.read_text())
        except (OSError, ValueError) as error:
            raise ServerError(
                "FL-S206", f"{path} cannot be read: {error}", "restore it, or use a new --state"
            ) from error


def begun(spec: RunSpec, rules: Rules, init: Path | None) -> RunSpec:
    """`spec` with what its first start was asked for: one that is killed before it has written a
    version and the journal leaves that to the next."""
    limits = {n: v for n in LIMITS if (v := getattr(rules, n)) is not None} if rules.ends() else {}
    return replace(spec, limits=limits, init="" if init is None else str(init.absolute()))


FIXED = (
    *("strategy", "aggregator", "outer", "algorithm", "model", "data", "trainer", "buffers"),
    *("proxy", "seed", "codec_up", "codec_down", "local", "dp", "local_dp", "init"),
)
LOOSE = ("lease", "save_every", "keep", "name", "most_examples")  # may change from start to start
OPTIONS = {  # what the command line calls them, where it is not the field's name
    "codec": ("codec_up", "codec_down"),
    "max_examples": ("most_examples",),
    "max_epsilon": ("dp", "local_dp"),
    **dict.fromkeys(("lr", "batch", "local_optimizer", "local_momentum", "clip"), ("local",)),
}


def open_spec(folder: Path, wanted: RunSpec, given: Collection[str] = ()) -> RunSpec:
    """The spec of the run in `folder`, written there if it is new.

    An existing run is what it is: ServerError FL-S109 where a field of `given` (those the user
    spelled out) differs from it. What is no part of the run, as the lease, is taken from `given`.
    """
    path = folder / "run.json"
    if not path.exists():
        refuse_foreign(folder)
        with locked(folder):  # another server may be beginning there at this moment
            if not path.exists():
                wanted.write(path)
                return wanted
    found = RunSpec.read(path)
    fields = {field for option in given for field in OPTIONS.get(option, (option,))}
    for name in sorted(fields.intersection(FIXED)):
        if not _same(name, getattr(found, name), getattr(wanted, name)):
            raise ServerError(
                "FL-S109",
                f"{folder} holds a run with {name}={getattr(found, name)!r}, "
                f"not {getattr(wanted, name)!r}",
                "leave the option out to go on with that run, or give another --state",
            )
    return replace(found, **{name: getattr(wanted, name) for name in fields.intersection(LOOSE)})


def _same(name: str, found: object, wanted: object) -> bool:
    """Whether a field says the same: a file may be named by two paths."""
    if name == "init" and found and wanted:
        return os.path.realpath(str(found)) == os.path.realpath(str(wanted))
    return found == wanted
