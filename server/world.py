"""World: how fast simulated clients train and transfer, and when they are away.

The speed models are those of the FedCompass paper (https://arxiv.org/abs/2309.14675, section 5): a
mean drawn once per client, 5 % noise per order, and a redraw of the mean with some probability.
Every client draws from its own generators, seeded by (seed, name): what one client does never
changes another's draws, nor does the order in which results arrive.
"""

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from atoll.protocols.errors import DataError, UsageError
from atoll.server.attack import Attack

Draw = Callable[[random.Random], float]  # a client's mean seconds per step
How = Literal["dead", "offline", "goodbye"]

NOISE = 0.05  # standard deviation of an order's pace, as a share of the client's mean
LEAST = 0.01  # of the mean: no draw is faster, none is zero or negative


@dataclass(frozen=True, slots=True)
class Absence:
    """A time in which a client is not connected.

    `dead`: its process is gone; work in progress is lost, finished results lie on its disk.
    `offline`: it trains on and brings the result when it is back. `goodbye`: dead, and it says so.
    """

    at: float
    until: float = math.inf
    how: How = "dead"

    def __post_init__(self) -> None:
        if not 0 <= self.at < self.until:
            raise UsageError(
                "FL-S102", f"absence from {self.at} to {self.until}", "it must end after it begins"
            )


@dataclass(frozen=True, slots=True)
class ClientModel:
    """One client as the simulator sees it. Times in seconds, bandwidths in bytes a second."""

    name: str
    seconds_per_step: float  # mean; where `change` redraws it, the first one
    noise: float = 0.0  # per order, share of the mean
    change: float = 0.0  # probability, before each order, that the mean is drawn anew
    draw: Draw | None = None  # from where; None: it never changes
    trace: tuple[float, ...] = ()  # recorded seconds per step, one per order, from the start again
    down: float = math.inf
    up: float = math.inf
    latency: float = 0.0  # one way
    joins: float = 0.0
    absences: tuple[Absence, ...] = ()  # in order, not overlapping
    uptime: float = math.inf  # mean seconds until it dies by chance, exponential
    downtime: float = 60.0  # mean seconds until it is back from that
    examples: int = 1
    benchmark: bool = False  # it says `seconds_per_step` when it joins
    codec: str = ""  # what it asks for, where anything is trained: "up=int8"; empty: as the run
    attack: str = ""  # what it does besides, where anything is trained: `atoll.server.attack`

    def __post_init__(self) -> None:
        for name in ("seconds_per_step", "down", "up", "uptime", "downtime"):
            if not getattr(self, name) > 0:
                raise _bad(f"{self.name}: {name}={getattr(self, name)}", "give more than 0")
        if self.noise < 0 or self.latency < 0 or self.joins < 0:
            raise _bad(f"{self.name}: negative noise, latency or joins", "give at least 0")
        if not 0 <= self.change <= 1:
            raise _bad(f"{self.name}: change={self.change}", "give a probability")
        if any(not pace > 0 for pace in self.trace):
            raise _bad(f"{self.name}: a pace in its trace is not positive", "give seconds per step")
        if self.attack:
            Attack.parse(self.attack)
        for former, later in zip(self.absences, self.absences[1:], strict=False):
            if later.at < former.until:
                raise _bad(f"{self.name}: absences at {former.at} and {later.at}", "in order")


@dataclass(slots=True)
class Pace:
    """The draws of one client: its pace order by order, its absences by chance."""

    model: ClientModel
    seed: int
    mean: float = field(init=False)
    orders: int = field(default=0, init=False)
    speed: random.Random = field(init=False)
    life: random.Random = field(init=False)
    planned: list[Absence] = field(init=False)

    def __post_init__(self) -> None:
        self.mean = self.model.seconds_per_step
        self.speed = random.Random(f"{self.seed}/{self.model.name}/speed")
        self.life = random.Random(f"{self.seed}/{self.model.name}/life")
        self.planned = list(self.model.absences)

    def next_order(self) -> float:
        """Seconds per step of the next order."""
        model, at = self.model, self.orders
        self.orders += 1
        if model.trace:
            return model.trace[at % len(model.trace)]
        if model.change and at and self.speed.random() < model.change and model.draw:
            self.mean = model.draw(self.speed)
        if not model.noise:
            return self.mean
        return max(LEAST * self.mean, self.speed.gauss(self.mean, model.noise * self.mean))

    def next_absence(self, now: float) -> Absence | None:
        """When it will be away next, asked when it comes (back) at `now`; None: never again."""
        chance = now + self.life.expovariate(1.0) * self.model.uptime
        if self.planned and self.planned[0].at <= chance:
            return self.planned.pop(0)
        if math.isinf(chance):
            return None
        back = chance + self.life.expovariate(1.0) * self.model.downtime
        while self.planned and self.planned[0].at < back:  # it is away then anyhow
            back = max(back, self.planned.pop(0).until)
        return Absence(chance, back)


# ---- distributions of the mean --------------------------------------------------------------


def homogeneous(mu: float) -> Draw:
    return lambda rng: mu


def normal(mu: float, spread: float = 0.3) -> Draw:
    """N(mu, (spread mu)^2), drawn again until positive."""

    def draw(rng: random.Random) -> float:
        while (value := rng.gauss(mu, spread * mu)) < LEAST * mu:
            pass
        return value

    return draw


def exponential(mu: float) -> Draw:
    """Exponential with mean mu: a few very slow ones; none faster than mu/100."""
    return lambda rng: max(LEAST * mu, rng.expovariate(1.0 / mu))


def lognormal(mu: float, sigma: float) -> Draw:
    """exp(N(., sigma^2)) with mean mu."""
    return lambda rng: math.exp(rng.gauss(math.log(mu) - sigma * sigma / 2, sigma))


def crowd(
    clients: int,
    draw: Draw,
    seed: int = 0,
    *,
    noise: float = NOISE,
    change: float = 0.0,
    prefix: str = "c",
) -> list[ClientModel]:
    """So many clients, each with a mean of its own draw: `c0`, `c1`, ..."""
    width = len(str(max(0, clients - 1)))
    names = [f"{prefix}{i:0{width}}" for i in range(clients)]
    return [
        ClientModel(
            name,
            draw(random.Random(f"{seed}/{name}/mean")),
            noise,
            change,
            draw if change else None,
        )
        for name in names
    ]


def speed_change(clients: Iterable[ClientModel], p: float, draw: Draw) -> list[ClientModel]:
    """The same clients, each drawing its mean anew with probability p before every order."""
    return [replace(client, change=p, draw=draw) for client in clients]


def at_paces(paces: Mapping[str, float]) -> list[ClientModel]:
    """Clients with constant seconds per step, without noise."""
    return [ClientModel(name, pace) for name, pace in paces.items()]


def attacked(
    clients: Sequence[ClientModel], attack: str, share: float, seed: int = 0
) -> list[ClientModel]:
    """The same clients, a `share` of them hostile, drawn by the seed. UsageError FL-S102."""
    if not 0 <= share <= 1:
        raise _bad(f"attackers={share}", "give a share from 0 to 1")
    drawn = random.Random(f"{seed}/attackers").sample(
        range(len(clients)), round(share * len(clients))
    )
    return [replace(c, attack=attack) if i in drawn else c for i, c in enumerate(clients)]


# ---- traces ---------------------------------------------------------------------------------


def trace(
    source: str | Path | Sequence[Sequence[float]] | Mapping[str, Sequence[float]],
) -> list[ClientModel]:
    """Clients that repeat recorded seconds per step, one value per order.

    A file is a run's `history.jsonl`, or JSON: an object {name: [paces]} or a list of such lists.
    Raises DataError FL-D101 or FL-D102.
    """
    if isinstance(source, str | Path):
        source = _read_trace(Path(source))
    if not isinstance(source, Mapping):
        source = {f"c{i}": paces for i, paces in enumerate(source)}
    for name, paces in source.items():
        if not paces:
            raise DataError("FL-D102", f"trace of {name!r} is empty", "record at least one order")
    return [
        ClientModel(name, math.fsum(paces) / len(paces), trace=tuple(paces))
        for name, paces in source.items()
    ]


def _read_trace(path: Path) -> Mapping[str, list[float]]:
    if not path.is_file():
        raise DataError("FL-D101", f"trace {path} not found", "give a history.jsonl or a JSON file")
    try:
        text = path.read_text()
        if path.suffix == ".jsonl":
            return _from_history(json.loads(line) for line in text.splitlines() if line.strip())
        data = json.loads(text)
        named = data if isinstance(data, dict) else {f"c{i}": v for i, v in enumerate(data)}
        return {str(name): [float(pace) for pace in paces] for name, paces in named.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            "FL-D102", f"trace {path}: {error}", "give {name: [seconds per step, ...]} as JSON"
        ) from error


def _from_history(rows: Iterable[dict[str, object]]) -> dict[str, list[float]]:
    paces: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] == "update":
            steps, seconds = float(str(row["steps"])), float(str(row["train_seconds"]))
            if steps > 0 and seconds > 0:
                paces.setdefault(str(row["client"]), []).append(seconds / steps)
    return paces


# ---- specs ----------------------------------------------------------------------------------

KNOWN = "speeds:1,1,2,4, homogeneous, normal, exp, lognormal:0.6, trace:FILE"


def parse(spec: str, clients: int = 4, mu: float = 0.1, seed: int = 0) -> list[ClientModel]:
    """Clients from a spec of the command line; `mu` is the mean of seconds per step.

    `speeds:1,1,2,4` are relative throughputs (4 is four times as fast as 1, whose pace is mu) and
    fix the number of clients, as `trace:FILE` does. `change=P` may follow a distribution, after a
    comma: `exp:change=0.1`. Raises UsageError FL-S101 or FL-S102.
    """
    name, _, rest = spec.partition(":")
    if name == "trace":
        return trace(rest)
    if name == "speeds":
        speeds = [_number(spec, text) for text in rest.split(",")]
        return at_paces({f"c{i}": mu / speed for i, speed in enumerate(speeds)})
    given = dict(_parameter(spec, text) for text in rest.split(",") if text)
    change, shape = given.pop("change", 0.0), given.pop("", None)
    if given:
        raise _bad(f"{spec!r}: unknown {sorted(given)[0]!r}", "write e.g. lognormal:0.6,change=0.1")
    match name:
        case "homogeneous" | "homo" if shape is None:
            draw = homogeneous(mu)
        case "normal":
            draw = normal(mu, 0.3 if shape is None else shape)
        case "exp" | "exponential" if shape is None:
            draw = exponential(mu)
        case "lognormal":
            draw = lognormal(mu, 0.6 if shape is None else shape)
        case _:
            raise UsageError("FL-S101", f"unknown speed model {spec!r}", f"known: {KNOWN}")
    return crowd(clients, draw, seed, change=change)


def _parameter(spec: str, text: str) -> tuple[str, float]:
    key, equals, value = text.partition("=")
    if not equals:
        return "", _number(spec, key)
    return key.strip(), _number(spec, value, zero=True)


def _number(spec: str, text: str, zero: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        raise _bad(f"{spec!r}: {text!r} is not a number above 0", f"write e.g. {KNOWN}")
    return value


def _bad(what: str, hint: str) -> UsageError:
    return UsageError("FL-S102", what, hint)
