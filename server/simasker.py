"""Simasker: the validators of a simulated run, asked in the middle of a merge; takes no time.

The same machine decides as in a real run: who is asked, and how much each answer counts.
"""

import copy
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from atoll.aggregation.aggregator import Aggregator, AskingRule
from atoll.aggregation.asking import Answer
from atoll.aggregation.validated import (
    Action,
    Answered,
    Asked,
    Began,
    Came,
    Done,
    Event,
    Failed,
    Left,
    Passed,
    Refused,
    Send,
    Validators,
    Verdict,
    Wait,
)
from atoll.client import contract
from atoll.client.flat import FlatModel
from atoll.client.heldout import HeldOut, Validator
from atoll.client.local import TorchTrainer
from atoll.protocols.errors import AtollError
from atoll.protocols.manifest import Manifest
from atoll.server.attack import Attack
from atoll.server.learner import asking, validated

if TYPE_CHECKING:
    from atoll.server.trainers import Trainers


logger = logging.getLogger(__name__)


class SimAsker:
    """An `Asker`. Who has been given an order can be asked, until it dies."""

    def __init__(
        self,
        rule: AskingRule,
        validators: Mapping[str, Validator | None],
        attacks: Mapping[str, Attack] | None = None,
    ) -> None:
        """`attacks` of hostile clients, who turn their gradients as they turn their updates."""
        self._machine = Validators(rule.panel, rule.deadline, rule.seed)
        self._validators = validators
        self._attacks = attacks or {}
        self._batch_statistics = rule.buffers == "recompute"
        self._warned = False

    @classmethod
    def of(cls, rule: AskingRule, trainers: "Trainers") -> Self:
        """All by one copy of the model, each on what its client holds out."""
        judge = trainers.judge()
        assert isinstance(judge, TorchTrainer)
        held = {name: trainers.held(name) for name in trainers.clients}
        some = trainers.loaded.shard(np.arange(1))  # it is told whose before it judges
        flat = FlatModel(copy.deepcopy(judge.model), some, judge.kind)
        made = {name: HeldOut(flat, examples) for name, examples in held.items()}
        return cls(rule, made, trainers.hostile)

    def came(self, client: str) -> None:
        if client not in self._machine.here:
            able = self._validators.get(client) is not None
            self._machine.handle(Came(client, able), 0.0)

    def left(self, client: str) -> None:
        self._machine.handle(Left(client), 0.0)

    def begin(self) -> None:
        self._machine.handle(Began(), 0.0)

    def ask(
        self, model: Tensor, buffers: Mapping[str, Tensor], gradient: bool
    ) -> Sequence[Answer] | None:
        slopes: dict[str, Tensor] = {}
        groups = {"trainable": model, **buffers}
        todo: deque[Action] = deque(self._machine.handle(Asked(gradient), 0.0))
        while todo:
            match todo.popleft():
                case Send(client, question):
                    heard = self._judge(client, question, groups, gradient, slopes)
                    todo.extend(self._machine.handle(heard, 0.0))
                case Done(_, counts):
                    return [Answer(count, slopes.get(count.client)) for count in counts]
                case Failed(_, reason):
                    if not self._warned:
                        logger.warning("nothing is learned in a merge: %s", reason)
                    self._warned = True  # once: the history has `validators: 0` for the others
                    return None
                case Wait():
                    pass  # all answer at once
        raise AssertionError("a question ends")

    def done(self) -> None:
        pass

    def interrupt(self) -> None:
        pass

    def _judge(
        self,
        client: str,
        question: int,
        groups: Mapping[str, Tensor],
        gradient: bool,
        slopes: dict[str, Tensor],
    ) -> Event:
        validator = self._validators[client]
        assert validator is not None, "only who is able is asked"
        try:
            loss, examples, slope = contract.judge(
                validator, groups, gradient, self._batch_statistics
            )
        except AtollError as error:
            return Refused(client, error.message)
        norm = 0.0
        if slope is not None:
            attack = self._attacks.get(client)
            slopes[client] = slope.clone() if attack is None else attack.on_delta(slope)
            norm = float(torch.linalg.vector_norm(slopes[client], dtype=torch.float64))
        if not math.isfinite(loss) or not math.isfinite(norm):
            return Passed(client)
        return Answered(client, question, Verdict(loss, examples, norm))


def asking_in(
    rule: Aggregator, manifest: Manifest, made: Callable[[AskingRule], SimAsker]
) -> tuple[Aggregator, SimAsker | None]:
    """`rule`, and whom it asks; None: it asks nobody."""
    asks = validated(rule)
    if asks is None:
        return rule, None
    asked = made(asks)
    return asking(asks, manifest.counts["trainable"], asked), asked
