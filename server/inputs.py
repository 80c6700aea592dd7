"""Inputs: what a run hears, each with its time, in the order in which it is heard."""

from collections.abc import Callable
from dataclasses import dataclass

from atoll.protocols.events import (
    ClientJoined,
    ClientLeft,
    Evaluated,
    Event,
    Merged,
    Stopping,
    TimerFired,
    UpdateReceived,
)
from atoll.server.payloads import Payload

RANK: dict[type[Event], int] = {  # of inputs at the same instant
    ClientLeft: 0,
    ClientJoined: 1,
    UpdateReceived: 2,
    Merged: 2,
    Evaluated: 2,
    TimerFired: 3,
    Stopping: 4,
}


@dataclass(slots=True)
class Input:
    """`then` is called once it is written and what was decided about it has been said."""

    now: float
    event: Event
    payload: Payload | None
    then: Callable[[], None] | None


def in_order(inputs: list[Input]) -> list[Input]:
    """As a strategy hears them: by time, then leave, join, update, timer, then by arrival.

    A client that joins and leaves at one instant has done so in this order.
    """
    joined: set[tuple[float, str]] = set()
    keys: list[tuple[float, int]] = []
    for one in inputs:
        rank = RANK[type(one.event)]
        if isinstance(one.event, ClientJoined):
            joined.add((one.now, one.event.client))
        elif isinstance(one.event, ClientLeft) and (one.now, one.event.client) in joined:
            rank = RANK[ClientJoined]
        keys.append((one.now, rank))
    return [inputs[i] for i in sorted(range(len(inputs)), key=keys.__getitem__)]
