"""Residual: what a client's codec left out, kept as private state until it could be sent.

Error feedback (`protocols/feedback.py`) over orders that overlap: what an update leaves out counts
at once, so the next one already carries it; where an `Outcome` says that an update was not used,
all that it had carried is given back. A kill between any two steps changes nothing
(`client/keep.py`): with decay 1, what was used and what is kept add up to all that was learned.

A codec that remembers something from one encoding to the next (PowerSGD's Q) has it kept here too,
with feedback or without. It only makes the next encoding better, so it stays whatever the outcome.
"""

from collections.abc import Mapping

from torch import Tensor

from atoll.client.keep import Named, Rule, Sent, added
from atoll.protocols.feedback import RESIDUAL, State

KIND = "residual"
CHANGE = "change"  # of the residual, by one update


class Residual(Rule):
    """State of `feedback.send`, and how updates change it."""

    def seen(self, held: Named, pending: Named) -> Named:
        state = {**held, **{n: t for n, t in pending.items() if n != CHANGE}}
        if CHANGE in pending:
            state[RESIDUAL] = added(held.get(RESIDUAL), pending[CHANGE])
        return state

    def used(self, held: Named, pending: Named, sent: Sent) -> Named:
        return self.seen(held, pending)

    def discarded(self, held: Named, pending: Named, sent: Sent) -> Named:
        state = dict(self.seen(held, pending))
        if CHANGE not in pending:  # sent without feedback: nothing of it was to come back
            return state
        try:
            carried = sent("trainable")
        except KeyError:  # packed by a codec of a former life, which nobody reads any more
            return state
        state[RESIDUAL] = added(state.get(RESIDUAL), carried)
        return state


def change(before: State, after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What one update makes of the state, to be held with it; empty where nothing is kept."""
    found = {name: tensor for name, tensor in after.items() if name != RESIDUAL}
    if RESIDUAL in after:
        former = before.get(RESIDUAL)
        found[CHANGE] = after[RESIDUAL] if former is None else after[RESIDUAL] - former
    return found
