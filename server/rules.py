"""When a run has done enough, and which version was best: the same rules for every strategy.

A machine beside the strategy's. Targets and patience look at one metric of the evaluations; a
metric whose name holds `loss` or `perplexity` is better when lower, any other when higher.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from atoll.protocols.errors import UsageError

LIMITS = ("target", "metric", "versions", "updates", "steps", "seconds", "patience")


@dataclass
class Rules:
    """Each limit ends the run when it is reached; None is no limit. All limits None: never."""

    target: float | None = None  # of `metric`
    metric: str = "accuracy"
    versions: int | None = None
    updates: int | None = None  # client updates used
    steps: int | None = None  # local steps in the updates used
    seconds: float | None = None  # run clock
    patience: int | None = None  # evaluations in a row without a better `metric`
    # state
    best: float | None = None
    best_version: int | None = None
    best_metrics: Mapping[str, float] = field(default_factory=dict)  # all of that evaluation
    since_best: int = 0  # evaluations
    latest_version: int = -1  # evaluated
    latest: float | None = None
    reached_at: float | None = None  # run clock when the target was first reached
    spent: str = ""  # why no more noise may be drawn; empty: it may

    def __post_init__(self) -> None:
        for name in ("versions", "updates", "steps", "seconds", "patience"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                ends = "at once" if value <= 0 else "never"
                hint = "give a number above 0, or leave it out"
                raise UsageError("FL-S108", f"{name}={value} would end the run {ends}", hint)
        if self.target is not None:
            share = self.metric == "accuracy"
            if not math.isfinite(self.target) or (share and not 0 < self.target <= 1):
                what = f"a target of {self.target} for {self.metric}"
                raise UsageError("FL-S108", what, "give a number above 0 and at most 1")

    def ends(self) -> bool:
        """Whether there is a limit at all."""
        return any(getattr(self, name) is not None for name in LIMITS if name != "metric")

    def evaluated(self, version: int, metrics: Mapping[str, float], now: float) -> None:
        """Hear of an evaluation; they may come out of order of their versions."""
        value = metrics.get(self.metric)
        if value is None:
            return
        if math.isnan(metrics.get("loss", 0.0)):  # a class for NaN may be the right one by chance
            value = math.nan
        if version >= self.latest_version:
            self.latest_version, self.latest = version, value
        if not math.isnan(value) and (self.best is None or self._better(value, self.best)):
            self.best, self.best_version, self.since_best = value, version, 0
            self.best_metrics = dict(metrics)
        else:
            self.since_best += 1
        self._look(now)

    def merged(self, stats: Mapping[str, float]) -> None:
        """Hear of a version: with differential privacy it says when the budget is spent."""
        if stats.get("budget_spent"):
            self.spent = f"privacy budget spent: epsilon {stats['epsilon']:.4g}"

    def take_limits(self, limits: "Rules", now: float) -> None:
        """Ask for what `limits` asks for from now on; another target may be reached, or not yet."""
        if (limits.target, limits.metric) != (self.target, self.metric):
            self.reached_at = None
        for name in LIMITS:
            setattr(self, name, getattr(limits, name))
        self._look(now)

    def _look(self, now: float) -> None:
        """Note when the best first meets the target."""
        if self.target is None or self.best is None or self.reached_at is not None:
            return
        if not self._better(self.target, self.best):
            self.reached_at = now

    def last(self, version: int) -> str | None:
        """Why none is begun after this version, which is being made; None: more are wanted."""
        if self.versions is None or version < self.versions:
            return None
        return _done(self.versions, "versions")

    def reason(self, versions: int, updates: int, steps: int, now: float) -> str | None:
        """Why the run ends now; None: it goes on."""
        if self.reached_at is not None:
            return f"target reached: {self.metric} {self.best:.4f}, wanted {self.target}"
        if self.spent:
            return self.spent
        counts = (("versions", versions), ("updates", updates), ("steps", steps), ("seconds", now))
        for name, count in counts:
            limit = getattr(self, name)
            if limit is not None and count >= limit:
                return _done(limit, name)
        if self.patience is not None and self.since_best >= self.patience:
            best = "none" if self.best is None else f"{self.best:.4f}"
            return f"no better {self.metric} in {self.patience} evaluations, best {best}"
        return None

    def _better(self, a: float, b: float) -> bool:
        lower = "loss" in self.metric or "perplexity" in self.metric
        return a < b if lower else a > b


def _done(limit: float, name: str) -> str:
    return f"{limit:g} {name} done" if isinstance(limit, float) else f"{limit} {name} done"
