"""Scenario: a text file with a strategy and its clients, and below the line what was decided.

A reviewer reads the difference of such files instead of a mock (`tests/transcripts/`).

strategy fedcompass:min_clients=5
client   c1 0.1                      seconds per step; also: examples=3 joins=2 paces=0.1,0.4
                                     attack=scale, where anything is trained
away     c1 12 20 offline            from, until (or "ever"), dead | offline | goodbye
lease    10                          seconds; 20 if not given
until    60
----
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from atoll.aggregation.strategy import Strategy
from atoll.protocols import slots
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
from atoll.server.simulator import simulate
from atoll.server.spec import STRATEGIES
from atoll.server.world import Absence, ClientModel, How

LINE = "----\n"


@dataclass
class Scenario:
    strategy: str = ""
    clients: dict[str, dict[str, str]] = field(default_factory=dict)
    absences: dict[str, list[Absence]] = field(default_factory=dict)
    lease: float = 20.0
    until: float = 60.0

    @classmethod
    def parse(cls, text: str) -> "Scenario":
        """Raises ValueError for a line that is none of those above."""
        scenario = cls()
        for line in text.splitlines():
            match line.partition("#")[0].split():
                case []:
                    pass
                case ["strategy", spec]:
                    scenario.strategy = spec
                case ["client", name, pace, *options]:
                    given = dict(o.split("=", 1) for o in options)
                    scenario.clients[name] = {"pace": pace} | given
                case ["away", name, start, end, ("dead" | "offline" | "goodbye") as how]:
                    scenario.away(name, start, end, how)
                case [("lease" | "until") as key, value]:
                    setattr(scenario, key, float(value))
                case _:
                    raise ValueError(f"not a line of a scenario: {line!r}")
        return scenario

    def away(self, name: str, start: str, end: str, how: How) -> None:
        until = float("inf") if end == "ever" else float(end)
        self.absences.setdefault(name, []).append(Absence(float(start), until, how))

    def models(self) -> list[ClientModel]:
        return [
            ClientModel(
                name,
                float(given["pace"]),
                examples=int(given.get("examples", "1")),
                joins=float(given.get("joins", "0")),
                trace=tuple(float(p) for p in given.get("paces", "").split(",") if p),
                absences=tuple(self.absences.get(name, ())),
                attack=given.get("attack", ""),
            )
            for name, given in self.clients.items()
        ]

    def play(self) -> "Transcript":
        strategy = slots.resolve("strategy", self.strategy, STRATEGIES)
        assert isinstance(strategy, Strategy)
        transcript = Transcript()
        simulate(strategy, self.models(), self.until, lease=self.lease, listen=transcript.hear)
        return transcript


class Transcript:
    """What was heard, each with what was decided about it, one line each."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.heard: list[tuple[float, Event, list[Action]]] = []
        self._version = 0
        self._orders = 0

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def hear(self, now: float, event: Event, actions: list[Action]) -> None:
        self.heard.append((now, event, actions))
        decided = list(self._decided(actions))
        if decided or not isinstance(event, Merged):  # that a version exists is said by its number
            self.lines.append(f"{now:7.2f}  {_heard(event)}")
        self.lines.extend(f"         {line}" for line in decided)

    def _decided(self, actions: list[Action]) -> Iterator[str]:
        for action in actions:
            match action:
                case Train(client, steps):
                    yield f"train {client}: {steps} steps on v{self._version} (o{self._orders})"
                    self._orders += 1
                case Aggregate(items, _, outer):
                    self._version += 1
                    what = ", ".join(f"{update}:{weight:.6g}" for update, weight in items)
                    past = "" if outer else ", past the outer optimizer"
                    yield f"aggregate {what} -> v{self._version}{past}"
                case Ask(client, then):
                    yield f"ask {client} to {then}"
                case Discard(update, reason):
                    yield f"discard {update}: {reason}"
                case SetTimer(timer, at):
                    yield f"set {timer} to {at:.2f}"
                case CancelTimer(timer):
                    yield f"cancel {timer}"
                case Finish(reason):
                    yield f"finish: {reason}"


def _heard(event: Event) -> str:
    match event:
        case ClientJoined(client, info):
            pace = "" if info.seconds_per_step is None else f", {info.seconds_per_step:g} s a step"
            return f"{client} joins with {info.examples} examples{pace}"
        case ClientLeft(client, reason):
            return f"{client} left: {reason}"
        case UpdateReceived(u):
            late = "" if u.current else ", its order was closed"
            return f"{u.id} from {u.client}: {u.steps} steps on v{u.base}{late}"
        case TimerFired(timer):
            return f"timer {timer}"
        case Merged(version, _):
            return f"v{version} exists"
        case Evaluated(version, metrics):
            return f"v{version} evaluated: {dict(metrics)}"
        case Stopping(reason):
            return f"stop: {reason}"
