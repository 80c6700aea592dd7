"""What a run is: everything that was decided before it began, kept as `run.json`.

The same spec drives a demo, a simulation and a server, and a restarted server reads it back.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from atoll.protocols import slots, state
from atoll.protocols.errors import ServerError

STRATEGIES: Mapping[str, str] = {
    "fedavg": "atoll.aggregation.fedavg:FedAvg",
    "fedbuff": "atoll.aggregation.fedbuff:FedBuff",
    "fedasync": "atoll.aggregation.fedbuff:fedasync",
    "fedcompass": "atoll.aggregation.fedcompass:FedCompass",
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
    data: str = "digits"  # the server's test set; clients bring their own
    codec_up: str = "fp32"
    codec_down: str = "fp32"
    buffers: str = "weighted_mean"
    local: Params = field(default_factory=dict)  # of LocalConfig
    seed: int = 0
    lease: float = 20.0  # seconds
    save_every: int = 1  # versions; those between are made again from kept updates after a crash
    keep: int = 5  # newest versions on disk, besides the first and the best

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
        )
        whole = asdict(self)
        return json.dumps({key: whole[key] for key in told})

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(state.dump(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "RunSpec":
        """Raises ServerError FL-S206 where the file is not a run's."""
        try:
            return state.loads(cls, path.read_text())
        except (OSError, ValueError) as error:
            raise ServerError(
                "FL-S206", f"{path} cannot be read: {error}", "restore it, or use a new --state"
            ) from error

    def make_strategy(self) -> object:
        return slots.resolve("strategy", self.strategy, STRATEGIES)
