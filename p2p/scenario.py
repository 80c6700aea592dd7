"""Scenario: a text file with a swarm, and below the line what its peers decided.

peer     a 1.0                       seconds of work in a round; also: weight=2 bandwidth=0
                                     joins=3 dies=2.4 leaves=5 spoils=1
parted   2 9 a,b                     from, until, those on one side
seed     1
epochs   3                           that all who live make
----
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from atoll.aggregation.rendezvous_events import (
    Abort,
    Apply,
    Download,
    Downloaded,
    Drop,
    Get,
    Leaving,
    Load,
    MeanFailed,
    MeanMade,
    PeerAction,
    PeerEvent,
    Reduce,
    Say,
    Started,
    StepsDone,
)
from atoll.aggregation.rendezvous_messages import Accept, Begin, Commit, Prepare
from atoll.p2p.outcome import Outcome
from atoll.p2p.virtual import Swarm
from atoll.p2p.world import PeerModel, Weather

LINE = "----\n"
REPEATED = ("proposes", "begins", "asks votes")  # at every beat, until all have answered


@dataclass
class Scenario:
    peers: list[PeerModel] = field(default_factory=list)
    parted: list[tuple[float, float, frozenset[str]]] = field(default_factory=list)
    seed: int = 0
    epochs: int = 3

    @classmethod
    def parse(cls, text: str) -> "Scenario":
        """Raises ValueError for a line that is none of those above."""
        scenario = cls()
        for line in text.splitlines():
            match line.partition("#")[0].split():
                case []:
                    pass
                case ["peer", name, pace, *options]:
                    given = dict(o.split("=", 1) for o in options)
                    spoils = int(given.pop("spoils", "-1"))
                    rest = {key: float(value) for key, value in given.items()}
                    scenario.peers.append(PeerModel(name, float(pace), spoils=spoils, **rest))  # type: ignore[arg-type]
                case ["parted", start, end, side]:
                    names = frozenset(side.split(","))
                    scenario.parted.append((float(start), float(end), names))
                case [("seed" | "epochs") as key, value]:
                    setattr(scenario, key, int(value))
                case _:
                    raise ValueError(f"not a line of a scenario: {line!r}")
        return scenario

    def play(self) -> tuple[Outcome, str]:
        """What became of it, and every decision, one line each."""
        deaths = sorted((p.dies, p.name) for p in self.peers)
        lines: list[str] = []
        said: dict[str, set[str]] = {p.name: set() for p in self.peers}

        def hear(now: float, name: str, event: PeerEvent, actions: list[PeerAction]) -> None:
            while deaths[0][0] < now:
                died, who = deaths.pop(0)
                lines.append(f"{died:7.2f}  {who} is dead")
            happened = _heard(event)
            for line in [*([happened] if happened else []), *_decided(actions)]:
                again = line.split(" of ")[0].split(" to ")[0]  # to some who have not answered yet
                if not line.startswith(REPEATED) or again not in said[name]:
                    lines.append(f"{now:7.2f}  {name} {line}")
                said[name].add(again)
            if any(isinstance(action, Apply) for action in actions):
                said[name].clear()

        deaths.append((float("inf"), ""))
        weather = Weather(parted=tuple(self.parted))
        outcome = Swarm(self.peers, weather, self.seed, listen=hear).run(self.epochs)
        return outcome, "\n".join(lines) + "\n"


def _heard(event: PeerEvent) -> str:
    match event:
        case Started():
            return "is up"
        case StepsDone():
            return "has done its work"
        case MeanMade(_, digest, ballot):
            return f"has the mean {digest[:6]} of {_name(ballot) if ballot else 'another'}"
        case MeanFailed(_, reason, ballot):
            return f"has no mean{' of ' + _name(ballot) if ballot else ''}: {reason}"
        case Downloaded():
            return "has the model it wanted"
        case Leaving():
            return "leaves"
    return ""


def _decided(actions: list[PeerAction]) -> Iterator[str]:
    said: dict[str, list[str]] = {}
    for action in actions:
        match action:
            case Say(peer, Prepare(_, ballot)):
                said.setdefault(f"proposes {_name(ballot)} to", []).append(peer)
            case Say(peer, Begin(_, ballot, plan)):
                pairs = zip(plan.group, plan.weights, strict=True)
                group = ", ".join(f"{p}:{w:g}" for p, w in pairs)
                said.setdefault(f"begins {_name(ballot)} of {group} with", []).append(peer)
            case Say(peer, Accept(_, ballot, value)):
                what = f"asks votes for {value.digest[:6]} in {_name(ballot)} of"
                said.setdefault(what, []).append(peer)
            case Say(peer, Commit(_, value)):
                said.setdefault(f"has decided {value.digest[:6]} and tells", []).append(peer)
    yield from (f"{what} {', '.join(peers)}" for what, peers in said.items())
    for action in actions:
        match action:
            case Reduce(_, ballot, plan):
                parts = ", ".join(f"{p.reducer} {p.start}-{p.stop}" for p in plan.parts)
                yield f"reduces {_name(ballot)}: {parts}"
            case Drop(_, ballot):
                yield f"drops {_name(ballot)}"
            case Get(_, digest, holders):
                yield f"fetches the mean {digest[:6]} from {', '.join(holders)}"
            case Apply(value, used):
                yield f"applies {value.digest[:6]}{'' if used else ', which its work is not in'}"
            case Download(stand, donors):
                yield f"downloads the model {stand.epoch} from {', '.join(donors)}"
            case Load(stand):
                yield f"uses the model {stand.epoch}"
            case Abort(reason):
                yield f"puts it off: {reason}"


def _name(ballot: tuple[int, str]) -> str:
    return f"{ballot[0]}.{ballot[1]}"
