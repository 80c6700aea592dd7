"""Presets: what a strategy that is a whole method asks of the other slots, where nobody else does.

DiLoCo is FedAvg's rounds with outer Nesterov and AdamW that clients keep
(https://arxiv.org/abs/2311.08105): `--strategy diloco` is these, and `--outer sgd` is still yours
to say.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from atoll.protocols import slots

Local = Mapping[str, bool | int | float | str]


@dataclass(frozen=True)
class Preset:
    outer: str = "sgd"
    local: Local = field(default_factory=dict)  # of LocalConfig


PRESETS: Mapping[str, Preset] = {
    "diloco": Preset(
        "nesterov:lr=0.7,momentum=0.9",
        {
            "optimizer": "adamw",
            "keep_optimizer_state": True,
            "lr": 1e-3,
            "weight_decay": 0.1,
            "clip": 1.0,
            "warm": 50,
        },
    )
}


def preset_of(strategy: object) -> Preset:
    """Of a built-in name, with or without parameters; else that all is as it is without one."""
    if not isinstance(strategy, str):
        return Preset()
    name, own, _ = slots.split(strategy)
    return Preset() if own else PRESETS.get(name, Preset())
