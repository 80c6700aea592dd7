"""Digest: one hash over all that a run heard and decided, in order. Same seed, same hash.

The real driver and the simulator feed the same, so two runs made the same decisions if their
digests are equal.
"""

import hashlib
from collections.abc import Iterable, Mapping

from atoll.protocols.events import (
    Action,
    Aggregate,
    Ask,
    CancelTimer,
    ClientJoined,
    ClientLeft,
    Discard,
    Evaluated,
    Event,
    Finish,
    Merged,
    SetTimer,
    Stopping,
    TimerFired,
    Train,
    UpdateReceived,
)

BATCH = 512  # inputs hashed at once: one call for each would cost as much as the run


class Digest:
    """SHA-256 over lines of text, floats in full."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._lines: list[str] = []

    def feed(self, now: float, event: Event, actions: Iterable[Action]) -> None:
        lines = self._lines
        lines.append(f"{now!r} {said(event)}")
        lines.extend([said(action) for action in actions])
        if len(lines) > BATCH:
            self._flush()

    def hex(self) -> str:
        """Of what was fed so far; more may follow."""
        self._flush()
        return self._hash.hexdigest()

    def _flush(self) -> None:
        if self._lines:
            self._hash.update(("\n".join(self._lines) + "\n").encode())
            self._lines.clear()


def said(one: Event | Action) -> str:
    """An event or action in one line, complete: unequal ones are unequal text."""
    match one:
        case UpdateReceived(u):
            return (
                f"update {u.id} {u.order} {u.client} {u.base} {u.steps} {u.examples} {u.started!r}"
                f" {u.train_seconds!r} {u.current:d}{u.final:d}"
            ) + (_pairs(u.metrics) if u.metrics else "")
        case Train(client, steps, extra):
            return f"train {client} {steps}{_pairs(extra) if extra else ''}"
        case Aggregate(items, model, outer):
            return f"aggregate {model} {outer:d} {items!r}"
        case SetTimer(timer, at):
            return f"set {timer} {at!r}"
        case CancelTimer(timer):
            return f"cancel {timer}"
        case TimerFired(timer):
            return f"fired {timer}"
        case Merged(version, used, dropped, stats):
            return f"merged {version} {' '.join(used)} {dropped!r}{_pairs(stats)}"
        case Evaluated(version, metrics):
            return f"evaluated {version}{_pairs(metrics)}"
        case ClientJoined(client, info):
            return f"joined {client} {info!r}"
        case ClientLeft(client, reason):
            return f"left {client} {reason!r}"
        case Discard(update, reason):
            return f"discard {update} {reason!r}"
        case Ask(client, then):
            return f"ask {client} {then}"
        case Stopping(reason):
            return f"stopping {reason!r}"
        case Finish(reason):
            return f"finish {reason!r}"


def _pairs(numbers: Mapping[str, float]) -> str:
    return " " + " ".join(f"{key}={value!r}" for key, value in sorted(numbers.items()))
