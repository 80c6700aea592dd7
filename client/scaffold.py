"""SCAFFOLD, SCAFFOLD-M and SCAFFOLD-M-VR: each client corrects its drift by its control variate.

Karimireddy et al. 2020, https://arxiv.org/abs/1910.06378; with momentum and variance reduction:
Cheng, Huang, Wu, Yuan, ICLR 2024, https://arxiv.org/abs/2306.16504. c_i is the client's mean raw
gradient of the last order that was used, c its mean over all clients, g as in `momentum.py`:

    SCAFFOLD         d = G(y) + (c - c_i)
    SCAFFOLD-M       d = beta (G(y) + (c - c_i)) + (1 - beta) g
    SCAFFOLD-M-VR    d = G(y) + beta (c - c_i) + (1 - beta) (g - G(x_prev))

After the order c_i + dc is the mean of its G(y); the client takes it when it hears that the update
was used and the server could count it (`atoll.aggregation.control`, whose rule this repeats). With
`table=server` the server keeps c_i and sends it with each order, for clients that keep no state.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from atoll.aggregation.control import CHANGE, CONTROL, VARIATE, Control
from atoll.aggregation.direction import DIRECTION
from atoll.aggregation.half import COMMITS, Half
from atoll.client.algorithm import Again, Measured, Params, flat_like
from atoll.client.keep import Named, Rule, Sent, added
from atoll.client.momentum import Steering, former, gradients, recursive
from atoll.client.trainer import Task
from atoll.protocols.errors import ClientError, UsageError

KIND = "control"
Where = Literal["client", "server"]


class Variate(Rule):
    """c_i, the number of changes in it, and the epoch in which it is worth something."""

    def used(self, held: Named, pending: Named, sent: Sent) -> Named:
        epoch, commits = standing(held, int(pending["epoch"]))
        if (epoch, commits) != (int(pending["epoch"]), int(pending["commits"])):
            return held  # it rests on a state that the server did not know either
        c = added(held["c"] if commits else None, sent(f"extra:{CHANGE}"))
        return {"c": c, "commits": torch.tensor(commits + 1), "epoch": torch.tensor(epoch)}


def standing(held: Named, epoch: int) -> tuple[int, int]:
    """(epoch, changes) of a state as one of `epoch` sees it: those of a former epoch are void."""
    own = int(held["epoch"]) if held else 0
    return (epoch, 0) if own < epoch else (own, int(held["commits"]) if held else 0)


def variate(held: Named, epoch: int) -> Tensor | None:
    """c_i in that epoch; None: it is 0."""
    return held["c"] if held and standing(held, epoch)[1] else None


class Scaffold(Steering):
    """Control variates against drift: for clients that hold unlike data, any participation."""

    momentum: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"plain_sgd", "client_state", "mixture"})
    gives: ClassVar[frozenset[str]] = frozenset({"control_variates"})

    def __init__(
        self,
        table: Where = "client",  # who keeps c_i; "server": a table there, clients keep nothing
    ) -> None:
        self.mix(beta=1)
        self.keep(table)

    def keep(self, table: Where) -> None:
        """UsageError FL-S102."""
        if table not in get_args(Where):
            raise UsageError("FL-S102", f"table={table!r}", f"one of {', '.join(get_args(Where))}")
        self.table = table == "server"
        self._sum: list[Tensor] = []  # of raw gradients

    @property
    def rules(self) -> Mapping[str, Rule]:
        return {} if self.table else {KIND: Variate()}

    def server_half(self) -> Half:
        return Control(momentum=self.momentum, table=self.table)

    def before_order(self, params: Params, task: Task) -> None:
        super().before_order(params, task)
        self._sum = [torch.zeros_like(p, dtype=torch.float32) for p in params.values()]

    def fixed(self, task: Task) -> Tensor:
        mine = sent(task) if self.table else variate(task.state(KIND), epoch_of(task))
        correction = task.vector(CONTROL) if mine is None else task.vector(CONTROL) - mine
        if not self.momentum:
            return correction
        return correction * self._beta + task.vector(DIRECTION) * (1 - self._beta)

    def transform_grad(self, params: Params, again: Again) -> None:
        torch._foreach_add_(self._sum, gradients(params))
        super().transform_grad(params, again)

    def measure(self, params: Params, task: Task, steps: int, lr: float) -> Measured:
        """dc rests on the state as it is now: an outcome may have come while it was training."""
        if self.table:
            return self._change_of(sent(task), steps, lr, {COMMITS: commits_of(task)})
        held = task.latest(KIND)
        epoch, commits = standing(held, epoch_of(task))
        said = {"life": float(task.life), "epoch": float(epoch), COMMITS: float(commits)}
        state = {KIND: {"epoch": torch.tensor(epoch), "commits": torch.tensor(commits)}}
        return replace(self._change_of(variate(held, epoch), steps, lr, said), state=state)

    def _change_of(
        self, mine: Tensor | None, steps: int, lr: float, said: Mapping[str, float]
    ) -> Measured:
        mean = flat_like(self._sum) / max(1, steps)
        change = mean if mine is None else mean - mine
        return Measured({CHANGE: change}, {"steps": float(steps), "lr": lr, **said})


class ScaffoldM(Scaffold):
    """SCAFFOLD with momentum over rounds: holds at large local steps and low participation."""

    momentum: ClassVar[bool] = True
    gives: ClassVar[frozenset[str]] = frozenset({"control_variates", "server_momentum"})

    def __init__(
        self,
        beta: float = 0.1,  # weight of the fresh gradient, 1: no momentum; try 0.2, 0.5
        warm: bool = False,  # before the first merge g is 0: train that round with beta = 1
        table: Where = "client",  # who keeps c_i; "server": a table there, clients keep nothing
    ) -> None:
        self.mix(beta, warm)
        self.keep(table)


class ScaffoldMVR(ScaffoldM):
    """Experimental: SCAFFOLD-M with variance reduction, which diverges unless steps are small."""

    reevaluates: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"plain_sgd", "client_state", "mixture", "rounds"})

    def __init__(
        self,
        beta: float = 0.1,  # weight of the fresh gradient, 1: no momentum; try 0.2, 0.5
        warm: bool = False,  # before the first merge g is 0: train that round with beta = 1
        table: Where = "client",  # who keeps c_i; "server": a table there, clients keep nothing
    ) -> None:
        super().__init__(beta, warm, table)
        self._former: list[Tensor] = []

    def server_half(self) -> Half:
        return Control(momentum=True, former=True, table=self.table)

    def before_order(self, params: Params, task: Task) -> None:
        super().before_order(params, task)
        self._former = former(params, task) if self._beta != 1 else []

    def transform_grad(self, params: Params, again: Again) -> None:
        torch._foreach_add_(self._sum, gradients(params))
        recursive(params, again, self._former, self._beta, self._fixed)


def epoch_of(task: Task) -> int:
    return int(task.extra.get("epoch", 0))


def commits_of(task: Task) -> float:
    """How many changes there are in the c_i that came with the order."""
    return task.extra.get(COMMITS, 0.0)


def sent(task: Task) -> Tensor | None:
    """c_i as it came; None: it is 0. ClientError FL-C103 where it was to come and did not."""
    if VARIATE in task.extras or not commits_of(task):
        return task.extras.get(VARIATE)
    raise ClientError(
        "FL-C103",
        f"an order brings no {VARIATE!r}, of which there are {commits_of(task):g} changes",
        "let client and server run the same version of atoll",
    )
