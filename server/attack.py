"""Attack: what a hostile client of a simulated run does to its data, or to the update it sends.

    sign-flip[:S]   sends the opposite of what it learnt, S times (1)
    scale[:S]       sends S times (1000) what it learnt
    label-flip      trains on labels turned round, y -> classes - 1 - y, and knows of nothing

Each acts for itself; those who know the others' updates and hide among them are not simulated.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from atoll.protocols.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from atoll.client.data import Data

Kind = Literal["sign-flip", "scale", "label-flip"]
STRENGTH: dict[Kind, float | None] = {"sign-flip": 1.0, "scale": 1000.0, "label-flip": None}


@dataclass(frozen=True, slots=True)
class Attack:
    kind: Kind
    strength: float = 1.0  # times; not of label-flip

    @classmethod
    def parse(cls, spec: str) -> "Attack":
        """Raises UsageError FL-S101 or FL-S102."""
        name, colon, rest = spec.partition(":")
        kind = next((kind for kind in STRENGTH if kind == name), None)
        if kind is None:
            raise UsageError("FL-S101", f"unknown attack {spec!r}", f"known: {', '.join(STRENGTH)}")
        usual = STRENGTH[kind]
        if not colon:
            return cls(kind, usual or 1.0)
        try:
            strength = float(rest)
        except ValueError:
            strength = math.nan
        if usual is None or not 0 < strength < math.inf:
            raise UsageError(
                "FL-S102", f"attack {spec!r}",
                f"write {name}" if usual is None else f"write e.g. {name}:{usual:g}",
            )  # fmt: skip
        return cls(kind, strength)

    def on_data(self, data: "Data") -> "Data":
        """The data as the attacker sees it. UsageError FL-S104 where it has no such labels."""
        from atoll.client.data import Split

        if self.kind != "label-flip":
            return data
        if data.info.kind != "classification" or not isinstance(data.train, Split):
            raise UsageError(
                "FL-S104", "label-flip, but the data are no tensors with classes",
                "use another attack, or a built-in source such as digits",
            )  # fmt: skip
        turned = replace(data.train, y=data.info.classes - 1 - data.train.y)
        return replace(data, train=turned)

    def on_delta(self, delta: "Tensor") -> "Tensor":
        """What it sends instead of its delta (parameters,)."""
        match self.kind:
            case "sign-flip":
                return delta * -self.strength
            case "scale":
                return delta * self.strength
            case _:
                return delta
