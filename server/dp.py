"""DP: what `--dp` and `--local-dp` ask for, read before anything starts; no torch is needed."""

import importlib.util
import math
from dataclasses import dataclass
from typing import Literal

from atoll.aggregation.checks import at_least, at_most, finite, one_of, positive
from atoll.aggregation.gaussian import check_delta, check_noise
from atoll.client.localdp import local_dp
from atoll.protocols import slots
from atoll.protocols.errors import UsageError
from atoll.protocols.facts import Facts
from atoll.server.spec import RunSpec


@dataclass(frozen=True)
class CentralDP:
    """What `--dp` says. Raises UsageError FL-S102 for a value that cannot be."""

    clip: float = 1.0  # length (L2) to which an update is cut; with `adaptive`, the first one
    noise: float = 1.0  # z: standard deviation / what one client can move. 0: clip alone
    delta: float = 1e-5  # choose less than 1 / clients
    epsilon: float | None = None  # the most that any client may pay; None: no limit
    adaptive: bool = False  # let the clip follow a quantile of the lengths
    quantile: float = 0.5  # the share of updates that are not cut
    rate: float = 0.2  # of the adaptive clip: log clip moves by rate * (share - quantile)
    count_noise: float | None = None  # of the number not cut; None: updates / 20, or z if more
    weights: Literal["uniform", "strategy"] = "uniform"  # alike for all, or as the strategy says
    cap: float = math.inf  # with "strategy": no client's weight in a version is above

    def __post_init__(self) -> None:
        check_noise(self.clip, noise=self.noise, count_noise=self.count_noise)
        positive(epsilon=self.epsilon, rate=self.rate, cap=self.cap, count_noise=self.count_noise)
        finite(rate=self.rate)
        at_least(0, quantile=self.quantile)
        at_most(1, quantile=self.quantile)
        check_delta(self.delta)
        one_of(("uniform", "strategy"), weights=self.weights)
        if self.adaptive and self.count_noise is not None and self.noise >= 2 * self.count_noise:
            raise UsageError(
                "FL-S102", f"count_noise={self.count_noise} with noise={self.noise}",
                f"choose more than noise / 2, {self.noise / 2:g}",
            )  # fmt: skip


def central_dp(spec: str) -> CentralDP:
    """From `clip=0.3,noise=1`. UsageError FL-S102."""
    made = slots.call("--dp", spec, CentralDP, slots.parameters(spec, f"--dp {spec}"))
    assert isinstance(made, CentralDP)
    return made


def facts_of(spec: RunSpec) -> list[Facts]:
    """What both kinds of noise need of the other parts. UsageError FL-S102, FL-S103."""
    found = []
    if spec.dp:
        central_dp(spec.dp)
        accounting()
        unseen = frozenset({"control_variates"})  # they come beside the update, as they are
        found.append(Facts("--dp", spec.dp, frozenset({"weighted_sum"}), refuses=unseen))
    if spec.local_dp:
        local_dp(spec.local_dp)
        later = frozenset({"control_variates", "error_feedback"})  # it sends later what was cut off
        gives = frozenset({"bounded_updates"})
        found.append(Facts("--local-dp", spec.local_dp, gives=gives, refuses=later))
    return found


def accounting() -> None:
    """UsageError FL-S103 where `dp-accounting` is not installed."""
    if importlib.util.find_spec("dp_accounting") is None:
        raise UsageError(
            "FL-S103", "--dp counts epsilon with dp-accounting, which cannot be imported",
            "pip install 'atoll[privacy]', or leave --dp out",
        )  # fmt: skip
