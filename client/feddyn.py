"""FedDyn: a client's objective is bent, so that its optimum is that of all clients.

Acar et al. 2021, https://arxiv.org/abs/2111.04263. With lambda_i the client's own vector, x the
model that came, delta = x - y:

    d = G(y) - lambda_i + alpha (y - x)
    lambda_i := lambda_i + alpha delta       when the update was used, delta as it was decoded

The server's half is `atoll.aggregation.dynamic`.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from atoll.aggregation.dynamic import DELTA, Dynamic
from atoll.aggregation.half import Half
from atoll.client.algorithm import Again, LocalAlgorithm, Measured, Params, split
from atoll.client.keep import Named, Rule, Sent, added
from atoll.client.momentum import gradients
from atoll.client.scaffold import epoch_of, standing
from atoll.client.trainer import Task
from atoll.protocols.errors import UsageError

KIND = "lambda"


class Lambda(Rule):
    """Adds alpha * delta of every update that was used."""

    gives: ClassVar[frozenset[str]] = frozenset({"control_variates"})  # its lambdas are such

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def used(self, held: Named, pending: Named, sent: Sent) -> Named:
        epoch, commits = standing(held, int(pending["epoch"]))
        if epoch != int(pending["epoch"]):
            return held
        mine = added(held["c"] if commits else None, sent(DELTA) * self.alpha)
        return {"c": mine, "commits": torch.tensor(commits + 1), "epoch": torch.tensor(epoch)}


class FedDyn(LocalAlgorithm):
    """Dynamic regularisation: drift is removed without an extra vector on the wire."""

    steers: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"plain_sgd", "client_state", "mixture", "rounds"})

    gives: ClassVar[frozenset[str]] = frozenset({"control_variates"})  # its lambdas are such

    def __init__(
        self,
        alpha: float = 0.1,  # how strong the pull and the correction are
    ) -> None:
        if not (math.isfinite(alpha) and alpha > 0):
            raise UsageError("FL-S102", f"feddyn: alpha={alpha}", "give more than 0")
        self.alpha = alpha
        self._lambda: list[Tensor] = []
        self._anchor: list[Tensor] = []

    @property
    def rules(self) -> Mapping[str, Rule]:
        return {KIND: Lambda(self.alpha)}

    def server_half(self) -> Half:
        return Dynamic(self.alpha)

    def before_order(self, params: Params, task: Task) -> None:
        held = task.state(KIND)
        has = bool(held) and standing(held, epoch_of(task))[1] > 0
        self._lambda = split(held["c"], params) if has else []
        self._anchor = [p.detach().clone() for p in params.values()]

    def transform_grad(self, params: Params, again: Again) -> None:
        grads = gradients(params)
        if self._lambda:
            torch._foreach_sub_(grads, self._lambda)
        with torch.no_grad():
            moved = torch._foreach_sub(list(params.values()), self._anchor)
            torch._foreach_add_(grads, moved, alpha=self.alpha)

    def measure(self, params: Params, task: Task, steps: int, lr: float) -> Measured:
        epoch, commits = standing(task.latest(KIND), epoch_of(task))
        return Measured(
            said={"life": float(task.life), "epoch": float(epoch), "commits": float(commits)},
            state={KIND: {"epoch": torch.tensor(epoch)}},
        )
