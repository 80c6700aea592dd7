"""Simulated: one peer of a swarm in virtual time: its machine, its model, which life it is in."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from atoll.aggregation.meter import Meter
from atoll.aggregation.rendezvous import Rendezvous
from atoll.aggregation.rendezvous_events import Apply, PeerAction
from atoll.aggregation.rendezvous_messages import Message
from atoll.p2p.vectors import Vector
from atoll.p2p.world import PeerModel

HEARD = 50  # messages that a liar may say again


@dataclass
class Simulated:
    model: PeerModel
    machine: Rendezvous
    anchor: Vector
    loaded: tuple[str, Vector] = ("", [])  # the chain of a model that was downloaded
    alive: bool = False
    lives: int = 0  # so far: what was begun in another is nothing in this
    handled: int = 0
    heard: deque[Message] = field(default_factory=lambda: deque(maxlen=HEARD))
    trained: str = ""  # the model it works on
    means: dict[str, Vector] = field(default_factory=dict)  # digest -> mean
    meter: Meter = field(default_factory=lambda: Meter(tiny=1, enough=1))

    def expected(self, now: float) -> bool:
        """Whether it should come as far as the others: it lives, or will."""
        dead = self.lives == 1 and not self.alive and not self.machine.left
        return self.alive or now < self.model.joins or (dead and self.model.returns < math.inf)

    def dies_now(self, actions: Sequence[PeerAction]) -> bool:
        """Whether these are its last words."""
        applies = any(isinstance(action, Apply) for action in actions)
        last = applies and self.machine.stand.epoch == self.model.dies_applying
        return last or self.handled == self.model.dies_after
