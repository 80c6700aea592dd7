"""Local DP: a client cuts its update and adds noise itself, before anything is packed.

For a server that need not be trusted: what leaves this machine is protected already, whatever is
done with it. The price is that the noise of n clients adds up, to 1/sqrt(n) of each one's instead
of the 1/n of central noise (`server/privacy.py`). Each update that leaves costs mu = 1 / noise, and
costs add up in squares (`aggregation/gaussian.py`); a client that has spent its epsilon takes part
no more. Duchi, Jordan and Wainwright 2013, https://arxiv.org/abs/1302.3203.

A real client draws each update's key from the system's secure generator and forgets it: what was
sent lies whole in the outbox, so nothing needs to be drawn again, and noise that comes again would
only help who wants to subtract it. A simulation gives keys that come again with its seed.
"""

import math
import typing
from dataclasses import dataclass

from atoll.aggregation.checks import positive
from atoll.aggregation.gaussian import check_delta, check_noise, epsilon_of
from atoll.protocols import slots
from atoll.protocols.errors import ClientError

if typing.TYPE_CHECKING:  # a server reads the spec without torch
    from torch import Tensor

BLOCK = 1 << 20  # elements of which the length is added up at once


@dataclass(frozen=True)
class LocalDP:
    """What `--local-dp` says. Raises UsageError FL-S102 for a value that cannot be."""

    clip: float = 1.0  # length (L2) to which the update is cut
    noise: float = 1.0  # standard deviation / clip. 0: clip alone
    delta: float = 1e-5
    epsilon: float | None = None  # the most that this client spends in a run; None: no limit

    def __post_init__(self) -> None:
        check_noise(self.clip, noise=self.noise)
        positive(epsilon=self.epsilon)
        check_delta(self.delta)

    def cost(self, updates: int) -> float:
        """Epsilon of so many updates sent."""
        if updates == 0:
            return 0.0
        return epsilon_of(math.sqrt(updates) / self.noise if self.noise else math.inf, self.delta)

    def afford(self, updates: int) -> None:
        """Before one more than `updates` is made. ClientError FL-C107: the budget is spent."""
        if self.epsilon is not None and self.cost(updates + 1) > self.epsilon:
            raise ClientError(
                "FL-C107",
                f"privacy budget spent: {updates} updates cost epsilon {self.cost(updates):.4g}, "
                f"one more would pass {self.epsilon:g}",
                "leave the run, or join the next one with more noise or a greater epsilon",
            )

    def protect(self, delta: "Tensor", key: bytes) -> None:
        """Cut a flat float32 delta to `clip` and add noise, in place. `key`: used only once."""
        from atoll.aggregation.noise import add_

        length = math.sqrt(
            math.fsum(
                float(delta[lo : lo + BLOCK].double().square().sum())
                for lo in range(0, delta.numel(), BLOCK)
            )
        )
        if not math.isfinite(length):
            return  # it is refused as it is: noise would not make a number of it
        if length > self.clip:
            delta.mul_(self.clip / length)
        if self.noise:
            add_(delta, key, self.noise * self.clip)


def local_dp(spec: str) -> LocalDP:
    """From `clip=0.3,noise=2`. UsageError FL-S102."""
    made = slots.call("--local-dp", spec, LocalDP, slots.parameters(spec, f"--local-dp {spec}"))
    assert isinstance(made, LocalDP)
    return made


def stricter(own: LocalDP | None, runs: LocalDP | None) -> LocalDP | None:
    """Both wishes at once: the shorter clip, the greater noise, the smaller budget."""
    if own is None or runs is None:
        return own or runs
    clip = min(own.clip, runs.clip)
    std = max(own.clip * own.noise, runs.clip * runs.noise)
    budgets = [p.epsilon for p in (own, runs) if p.epsilon is not None]
    return LocalDP(clip, std / clip, min(own.delta, runs.delta), min(budgets, default=None))
