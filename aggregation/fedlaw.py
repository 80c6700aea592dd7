"""FedLAW: the server learns how much of each client's model to take, and how long the sum may be.

Li, Lin, Shang and Wu, ICML 2023, https://arxiv.org/abs/2302.10911: with a few labelled examples of
its own (proxy data), the server learns simplex weights lambda and a scale gamma anew in each merge,

    w = gamma * sum of lambda_i * y_i            y_i = x - delta_i, re-anchored at the model of now

from the strategy's weights and gamma = 1 (which is FedAvg) on. A gamma below 1 is like weight
decay of the whole model. As a delta, x - w = (1 - gamma) x + gamma * sum of lambda_i * delta_i: a
weighted sum of the updates and of x, so a merge is a merge like another once they are known.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from atoll.aggregation.checks import at_least, at_most, one_of, positive
from atoll.aggregation.validated import LEAST
from atoll.protocols.errors import UsageError

if TYPE_CHECKING:  # what needs torch comes with the first merge: the check at start reads `needs`
    from atoll.aggregation.fedlaw_learn import How
    from atoll.aggregation.proxy import Proxy
    from atoll.aggregation.stack import Stack

MODES = ("both", "lambda", "gamma", "fixed")
RATE = 0.005
ASKED_RATE = 0.2  # five steps of 0.005 move a share by a fortieth
WITHOUT = ("error", "fedavg", "fixed_gamma", "coherence", "validators")


@dataclass(frozen=True)
class FedLaw:
    """`mode`: what is learned; "fixed" learns nothing and needs no proxy data, only `gamma`.

    `gamma_max` keeps gamma down: None is the paper's, 1.0 is the choice where clients may hold bad
    data, as a free gamma grows the weights greedily. `no_proxy`: what to do without proxy data:
    refuse to start, take the strategy's weights, a fixed `gamma` with them, lambda by how well the
    updates agree (p_i * exp(cos(delta_i, mean) / temperature)), or ask `validators`, clients that
    judge on data they hold out: `panel` of them at most, each question for at most `deadline`
    seconds, in five steps a merge. An update more than `screen` times as long as the middle one
    takes no part: learning could not make its share small enough (0: all take part).
    """

    mode: Literal["both", "lambda", "gamma", "fixed"] = "both"  # what is learned
    gamma: float | None = None  # of mode "fixed" and of no_proxy "fixed_gamma"
    gamma_max: float | None = None  # 1.0 where clients may hold bad data; None: no limit
    epochs: int = 20  # over the proxy data, in each merge
    lr: float | None = None  # halved every 20 epochs; None: 0.005, of validators 0.2
    batch: int = 128  # proxy examples a step
    optimizer: Literal["adam", "sgd"] = "adam"  # "sgd": with momentum 0.9
    form: Literal["exp", "quad"] = "exp"  # "exp": softmax and exp; "quad": squares
    two_stage: bool = False  # lambda first, averaged over its way; then gamma
    no_proxy: Literal["error", "fedavg", "fixed_gamma", "coherence", "validators"] = (
        "error"  # what then
    )
    temperature: float = 0.5  # of coherence: with a high one, all count alike
    buffers: Literal["recompute", "average"] = "recompute"  # BatchNorm: by proxy data or clients'
    tolerance: float = 0.0  # what is learned may be so much worse than the mean, in loss
    screen: float = 100.0  # times the middle length; longer updates take no part; 0: all do
    max_models: int = 64  # with more updates, groups of them share a lambda
    min_updates: int = 2  # fewer are merged by their mean; with 1, gamma is learned alone
    panel: int = 16  # validators asked in a merge, at most
    deadline: float = 30.0  # seconds that the answers of validators may take
    seed: int = 0  # of the batches' order
    proxy: "Proxy | None" = field(default=None, init=False, repr=False, compare=False)

    algebra: ClassVar[Literal["set"]] = "set"
    private: ClassVar[bool] = False
    gives: ClassVar[frozenset[str]] = frozenset({"mixture"})  # by learned weights
    anchored: ClassVar[bool] = True  # the last row of the stack is the model

    def __post_init__(self) -> None:
        one_of(MODES, mode=self.mode)
        one_of(WITHOUT, no_proxy=self.no_proxy)
        one_of(("adam", "sgd"), optimizer=self.optimizer)
        one_of(("exp", "quad"), form=self.form)
        one_of(("recompute", "average"), buffers=self.buffers)
        positive(gamma=self.gamma, gamma_max=self.gamma_max, lr=self.lr)
        at_most(1e3, gamma=self.gamma, gamma_max=self.gamma_max, lr=self.lr)
        positive(temperature=self.temperature, deadline=self.deadline)
        at_least(0, epochs=self.epochs, tolerance=self.tolerance, screen=self.screen)
        at_least(0, seed=self.seed)
        at_least(1, batch=self.batch, max_models=self.max_models, min_updates=self.min_updates)
        at_least(LEAST, panel=self.panel)
        fixed = self.mode == "fixed" or self.no_proxy == "fixed_gamma"
        if fixed and self.gamma is None:
            raise UsageError(
                "FL-S102", "a fixed gamma is not given", "write e.g. fedlaw:mode=fixed,gamma=0.99"
            )
        if self.gamma is not None and not fixed:
            what = f"gamma={self.gamma} with mode={self.mode!r}, which does not look at it"
            raise UsageError("FL-S102", what, "write gamma_max to bound it, or mode=fixed")
        if self.two_stage and self.mode != "both":
            raise UsageError(
                "FL-S102", f"two_stage with mode={self.mode!r}", "two stages learn both: drop one"
            )
        if self.two_stage and self.asks:
            raise UsageError(
                "FL-S102", "two_stage with no_proxy='validators'",
                "validators are asked in few steps, of one stage: drop one",
            )  # fmt: skip

    @property
    def needs(self) -> frozenset[str]:
        """Proxy data or validators, where it cannot do without; each client's model in any case."""
        wanted = {"error": {"proxy_data"}, "validators": {"validators"}}.get(self.no_proxy, set())
        without = self.mode == "fixed" or self.proxy is not None
        return frozenset() if without else frozenset(wanted)

    @property
    def asks(self) -> bool:
        """Whether validators are to be asked, where there are no proxy data."""
        return self.mode != "fixed" and self.no_proxy == "validators"

    @property
    def min_results(self) -> int:
        return self.min_updates

    @property
    def learns(self) -> bool:
        """Whether proxy data are of use to it."""
        return self.mode != "fixed"

    def with_proxy(self, proxy: "Proxy") -> Self:
        """The same rule, with what it learns by."""
        made = replace(self)
        object.__setattr__(made, "proxy", proxy)
        return made

    def coefficients(self, stack: "Stack", weights: Sequence[float]) -> list[float]:
        """gamma * lambda_i of each update, and 1 - gamma of the model."""
        if self.mode == "fixed":
            return self._taken(weights, self.gamma or 1.0, {})
        if self.proxy is None:
            return self._without(stack, weights)
        from atoll.aggregation.fedlaw_learn import learn

        start = self._screened(stack, weights)
        found = learn(stack, self.proxy, start, self._how())
        losses = {"proxy_loss_before": found.before, "proxy_loss": found.after}
        told = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
        told.update(self.proxy.told())
        if found.guarded:
            told["guard"] = 1.0
        if 0.0 in start:
            told["screened"] = float(start.count(0.0))
        return self._taken(found.shares, found.gamma, told)

    def again(self, told: Mapping[str, float], updates: Sequence[str]) -> list[float]:
        """The coefficients of a merge from its stats, bit by bit, whoever was asked then."""
        shares = [told[f"lambda/{update}"] for update in updates]
        return self._taken(shares, told["gamma"], {})

    def _how(self) -> "How":
        from atoll.aggregation.fedlaw_learn import How

        asked = self.proxy is not None and self.proxy.examples is None
        lr = self.lr or (ASKED_RATE if asked else RATE)
        return How(
            self.mode != "gamma", self.mode != "lambda", self.epochs, lr, self.batch,
            self.optimizer, self.form, self.two_stage, self.gamma_max, self.tolerance,
            self.max_models, self.seed,
        )  # fmt: skip

    def _screened(self, stack: "Stack", weights: Sequence[float]) -> list[float]:
        """The weights, 0 for those whose update is out of all proportion."""
        lengths = stack.squares()[: len(weights)].sqrt()
        middle = float(lengths.sort().values[(len(weights) - 1) // 2])
        limit = self.screen * middle if self.screen and middle else math.inf
        kept = [w if n <= limit else 0.0 for w, n in zip(weights, lengths.tolist(), strict=True)]
        total = math.fsum(kept)
        return [w / total for w in kept] if 0.0 in kept else list(weights)

    def _without(self, stack: "Stack", weights: Sequence[float]) -> list[float]:
        if self.no_proxy == "fedavg":
            return self._taken(weights, 1.0, {})
        if self.no_proxy == "fixed_gamma":
            return self._taken(weights, self.gamma or 1.0, {})
        if self.no_proxy == "coherence":
            return self._taken(_coherent(stack, weights, self.temperature), 1.0, {})
        raise UsageError(
            "FL-S104", f"no_proxy={self.no_proxy} and nothing to learn by", "give it proxy data"
        )

    def _taken(self, shares: Sequence[float], gamma: float, stats: dict[str, float]) -> list[float]:
        from atoll.aggregation.stack import Reported

        each = [gamma * share for share in shares]
        return Reported([*each, 1 - gamma], {"gamma": gamma, **stats}, {"lambda": list(shares)})


def _coherent(stack: "Stack", weights: Sequence[float], temperature: float) -> list[float]:
    """lambda_i in proportion to p_i * exp(cos(delta_i, their mean) / temperature)."""
    gram = stack.gram()[: len(weights), : len(weights)]
    shares = gram.new_tensor(weights)
    to_mean = gram @ shares
    lengths = gram.diagonal().sqrt() * (shares @ to_mean).clamp(min=0).sqrt()
    cosines = (to_mean / lengths).nan_to_num(0.0)  # a delta of zeros points nowhere
    found: list[float] = (shares.log() + cosines / temperature).softmax(0).tolist()
    return found
