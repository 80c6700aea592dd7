"""Plausible: what a client claims of its own work, held to what the server knows itself.

A well-formed message may still lie: steps that nobody ordered, a training longer than the order has
been out, a million million examples. What cannot have happened is refused; what only may have not
is bounded, so that a liar gains no more than a bound's worth of weight.
"""

from collections.abc import Mapping

from atoll.protocols.bounds import SHARES
from atoll.protocols.errors import RemoteError
from atoll.protocols.messages import Result
from atoll.server.run import Order


def check_steps(result: Result, order: Order) -> None:
    """RemoteError FL-W101 where a result has more steps than were ordered, or none although nobody
    asked the client to stop early."""
    fewest = 0 if order.asked else 1
    if not fewest <= result.steps <= order.steps:
        raise RemoteError(
            "FL-W101",
            f"malformed message: order {order.id} is {order.steps} steps, its result has "
            f"{result.steps}",
            "run exactly the steps of an order, or fewer where it is asked for early",
        )


def seconds(claimed: float, since: float | None, now: float, running_since: float) -> float:
    """Seconds of training, at most those since the order could be fetched, run clock.

    An order older than the process is left as it is: the clock stood still while we were away.
    """
    if since is None or since < running_since:
        return claimed
    return min(claimed, max(0.0, now - since))


def examples(claimed: int, most: int) -> int:
    """What a client says it holds, `most` at most; 0: no bound."""
    return min(claimed, most) if most else claimed


def judged(metrics: Mapping[str, float]) -> dict[str, float]:
    """A client's evaluation without what cannot be: shares beyond 0 and 1 are left out."""
    return {k: v for k, v in metrics.items() if k not in SHARES or 0.0 <= v <= 1.0}
