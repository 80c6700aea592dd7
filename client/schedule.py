"""Schedules: what a local step's learning rate is multiplied with, by the step's number in the run.

    constant                              1
    cosine:steps=600,warm=50,floor=0.1    up to 1 in 50 steps, then down to 0.1 at step 600

Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983, with the linear start that
transformers need. The number counts over all rounds: a client that comes late starts where the run
is, and one that is slower steps less far in a round but lies no further behind.
"""

import math
from collections.abc import Callable

from atoll.protocols import slots
from atoll.protocols.errors import UsageError

Schedule = Callable[[int], float]  # step of the run, from 0 -> factor


def constant() -> Schedule:
    return lambda step: 1.0


def cosine(steps: int = 600, warm: int = 50, floor: float = 0.1) -> Schedule:
    if not (steps >= 1 and 0 <= warm <= steps and 0 <= floor <= 1):
        raise UsageError(
            "FL-S102",
            f"cosine: steps={steps}, warm={warm}, floor={floor}",
            "give steps of at least 1, warm from 0 to steps and floor from 0 to 1",
        )

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        gone = min(1.0, (step - warm) / max(1, steps - warm))
        return floor + (1 - floor) * (1 + math.cos(math.pi * gone)) / 2

    return factor


def schedule(spec: str) -> Schedule:
    """The schedule that `spec` names. UsageError FL-S101 or FL-S102."""
    return slots.resolve("schedule", spec, BUILTIN)  # type: ignore[return-value]


BUILTIN = {
    "constant": "atoll.client.schedule:constant",
    "cosine": "atoll.client.schedule:cosine",
}
