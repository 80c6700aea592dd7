"""Replay: feed what a run heard to a fresh strategy, and see that it decides the same again."""

from collections.abc import Iterable, Sequence

from atoll.aggregation.strategy import Strategy
from atoll.protocols.errors import ServerError
from atoll.protocols.events import Action, Event, Finish, Stopping
from atoll.server.digest import said
from atoll.server.journal import dump_actions, same

Decided = Sequence[Action] | str | None  # actions, or as the journal holds them; None: unknown
Recorded = Iterable[tuple[float, Event, Decided]]


def replay(strategy: Strategy, recorded: Recorded) -> int:
    """Inputs whose recorded actions came again, all of those that had some written down.

    The events are those the strategy heard, as `Run.handle` returns them; what came after the end
    of the run, late work, it did not hear. Raises ServerError FL-S209 at the first difference,
    showing both.
    """
    again, over = 0, False
    for at, (now, event, decided) in enumerate(recorded):
        actions = [] if over else strategy.handle(event, now)
        over = over or isinstance(event, Stopping) or any(isinstance(a, Finish) for a in actions)
        if decided is None:  # the process died before it could write them down
            continue
        text = decided if isinstance(decided, str) else dump_actions(decided)
        if not same(text, dump_actions(actions)):
            raise _differs(at, now, event, decided, actions)
        again += 1
    return again


def _differs(
    at: int, now: float, event: Event, decided: Sequence[Action] | str, actions: list[Action]
) -> ServerError:
    if isinstance(decided, str):
        was, is_now = decided, dump_actions(actions)
    else:
        was, is_now = _first_difference(list(decided), actions)
    return ServerError(
        "FL-S209",
        f"input {at} at {now:g} s ({said(event)}): recorded {was}, replayed {is_now}",
        "replay with the strategy, parameters and code that made the record",
    )


def _first_difference(was: list[Action], is_now: list[Action]) -> tuple[str, str]:
    for old, new in zip(was, is_now, strict=False):
        if old != new:
            return said(old), said(new)
    shorter = min(len(was), len(is_now))
    rest = [said(a) for a in (was[shorter:] or is_now[shorter:])]
    more, nothing = f"{len(rest)} more: {'; '.join(rest)}", "nothing more"
    return (more, nothing) if len(was) > len(is_now) else (nothing, more)
