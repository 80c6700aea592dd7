"""Validated: which clients judge the models of a merge, and how much each one's answer counts.

A machine. A server without data of its own asks some of its clients, the validators, for the loss
of a model on what they hold out, and for its gradient: a question to all of them at once, several
in a merge. Who does not answer in time, or leaves, takes no part in what is left of that merge;
with fewer answers than the quorum nothing is learned in it.

A validator may lie, or hold data that are wrong. No gradient is longer than the middle one, and no
change of the loss greater; no claim of examples counts for more than `MOST` times the middle one.
So two of six with turned labels do not decide: their losses are the highest and their gradients the
longest, three times the middle one was enough for them to stop all learning.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LEAST = 2  # validators; one alone would decide everything
MOST = 3.0  # times the middle one's examples
NAMED = 3  # clients with one reason,
REASONS = 6  # and reasons, where a merge goes unjudged


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a validator says of a model: over its own examples, held out of its training."""

    loss: float  # mean, finite
    examples: int  # that it held out
    norm: float  # of the gradient; 0 where none was asked for


@dataclass(frozen=True, slots=True)
class Count:
    """How an answer counts: `weight` in the mean (all sum to 1), `scale` of its gradient."""

    client: str
    weight: float
    scale: float
    loss: float


# ---- heard ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Came:
    """A client can be spoken to. `able`: it can judge models, and is willing to."""

    client: str
    able: bool


@dataclass(frozen=True, slots=True)
class Silent:
    """Its connection broke; it may come back."""

    client: str


@dataclass(frozen=True, slots=True)
class Left:
    """It is gone, and nothing of it is waited for."""

    client: str


@dataclass(frozen=True, slots=True)
class Began:
    """A merge begins: who judges is drawn anew."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The merge wants to know about a model. No other question is open."""

    gradient: bool


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer that was checked; to an older question it is void."""

    client: str
    question: int
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Passed:
    """It has no number to say of this model: it takes no part in what is left of the merge."""

    client: str


@dataclass(frozen=True, slots=True)
class Refused:
    """It declines, or what it sent was refused: it is not asked again until it has come anew."""

    client: str
    reason: str


@dataclass(frozen=True, slots=True)
class Expired:
    """The time that `Wait` named has come."""

    question: int


Event = Came | Silent | Left | Began | Asked | Answered | Passed | Refused | Expired

# ---- said ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Put the open question to a client, perhaps once more."""

    client: str
    question: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Say `Expired` at `at`, seconds, if the question is still open then."""

    question: int
    at: float


@dataclass(frozen=True, slots=True)
class Done:
    """The question is answered, by these, sorted by client."""

    question: int
    counts: tuple[Count, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """The question has too few answers: the merge learns nothing."""

    question: int
    reason: str


Action = Send | Wait | Done | Failed


@dataclass
class Validators:
    """`most` are asked in a merge, and each question may take `seconds`."""

    most: int = 16
    seconds: float = 30.0
    seed: int = 0
    here: dict[str, bool] = field(default_factory=dict)  # client -> able; who can be spoken to
    away: set[str] = field(default_factory=set)  # who may come back
    refused: dict[str, str] = field(default_factory=dict)  # client -> why it is not asked
    merges: int = 0  # begun
    panel: list[str] | None = None  # who judges in this merge; None: not drawn yet
    quorum: int = LEAST
    question: int = 0  # the newest
    open: bool = False
    waiting: set[str] = field(default_factory=set)  # of the panel, who has not answered
    lost: dict[str, str] = field(default_factory=dict)  # of this merge's panel -> why
    answers: dict[str, Verdict] = field(default_factory=dict)

    def handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case Came(client, able):
                return self._came(client, able)
            case Silent(client):
                self.here.pop(client, None)
                self.away.add(client)
                return self._look()
            case Left(client):
                self.here.pop(client, None)
                self.away.discard(client)
                self.refused.pop(client, None)
                return self._without(client, "left")
            case Began():
                self.merges, self.panel, self.open = self.merges + 1, None, False
                self.quorum, self.lost = LEAST, {}
                return []
            case Asked():
                return self._ask(now)
            case Answered(client, question, verdict):
                if not self.open or question != self.question or client not in self.waiting:
                    return []
                self.waiting.discard(client)
                self.answers[client] = verdict
                return self._look()
            case Passed(client):
                return self._without(client, "no finite loss of the model")
            case Refused(client, reason):
                self.refused[client] = reason
                return self._without(client, reason)
            case Expired(question):  # pragma: no branch
                if not self.open or question != self.question:
                    return []
                if self.panel is None:
                    return self._close(f"nobody else came within {self.seconds:g} s")
                return self._close("", f"no answer within {self.seconds:g} s")

    def _came(self, client: str, able: bool) -> list[Action]:
        self.here[client] = able
        self.away.discard(client)
        self.refused.pop(client, None)
        if self.open and self.panel is not None and client in self.waiting:
            return [Send(client, self.question)] if able else self._without(client, "declines")
        return self._look() if self.panel is None else []

    def _ask(self, now: float) -> list[Action]:
        assert not self.open, "one question at a time"
        self.question += 1
        self.open, self.answers, self.waiting = True, {}, set()
        wait = Wait(self.question, now + self.seconds)
        if self.panel is None:
            return [wait, *self._look()]
        self.waiting = set(self.panel)
        sent = [Send(c, self.question) for c in self.panel if c in self.here]
        return [wait, *sent, *self._look()]

    def _draw(self) -> list[Action]:
        """The first question of a merge waits for clients that may come back, if it must."""
        able = sorted(c for c, can in self.here.items() if can and c not in self.refused)
        if len(able) < LEAST:
            return [] if self.away else self._close(f"{len(able)} of the clients can be asked")
        if len(able) > self.most:
            able = sorted(random.Random(f"{self.seed}/{self.merges}").sample(able, self.most))
        self.panel, self.waiting = able, set(able)
        self.quorum = max(LEAST, -(-len(able) // 2))
        return [*(Send(c, self.question) for c in able), *self._look()]

    def _without(self, client: str, why: str) -> list[Action]:
        self.waiting.discard(client)
        if self.panel is not None and client in self.panel:
            self.panel.remove(client)
            self.lost[client] = why
        return self._look()

    def _look(self) -> list[Action]:
        """Whether the open question can be closed. Who is silent is not waited for when there are
        enough answers, for it may be dead; and it may come back where there are not."""
        if not self.open:
            return []
        if self.panel is None:
            return self._draw()
        if len(self.answers) + len(self.waiting) < self.quorum:
            return self._close("")
        if self.waiting and (len(self.answers) < self.quorum or self.waiting & self.here.keys()):
            return []
        return self._close("", "its connection broke")

    def _close(self, reason: str, late: str = "") -> list[Action]:
        """`reason` why there can be too few, `late` why those waited for are so no more; "": they
        could still have answered."""
        self.open = False
        if self.panel is not None:
            self.panel = [c for c in self.panel if c not in self.waiting]
            self.lost |= dict.fromkeys(self.waiting, late) if late else {}
        if len(self.answers) >= self.quorum:
            return [Done(self.question, counted(self.answers))]
        came = len(self.answers)
        told = f"{came} validator{'s' * (came != 1)} answered, {self.quorum} are needed"
        whys = _grouped({**self.refused, **self.lost})
        return [Failed(self.question, "; ".join(why for why in (told, reason, *whys) if why))]


def _grouped(reasons: Mapping[str, str]) -> list[str]:
    """Clients by what is said of them, in order, of each the first few."""
    groups: dict[str, list[str]] = {}
    for client, reason in sorted(reasons.items()):
        groups.setdefault(reason, []).append(client)
    return [f"{_some(clients)}: {reason}" for reason, clients in list(groups.items())[:REASONS]]


def _some(clients: Sequence[str]) -> str:
    more = len(clients) - NAMED
    return ", ".join(clients[:NAMED]) + (f" and {more} more" if more > 0 else "")


# ---- how much an answer counts -------------------------------------------------------------------


def middle(values: Sequence[float]) -> float:
    """The lower of the two middle ones, where there are two."""
    return sorted(values)[(len(values) - 1) // 2]


def counted(answers: Mapping[str, Verdict]) -> tuple[Count, ...]:
    """By examples, `MOST` times the middle one's at most; gradients as long as the middle one."""
    told = sorted(answers.items())
    most = MOST * middle([float(v.examples) for _, v in told])
    longest = middle([v.norm for _, v in told])
    sizes = [min(float(v.examples), most) for _, v in told]
    total = math.fsum(sizes)
    return tuple(
        Count(
            client,
            size / total,
            longest / v.norm if v.norm > longest else 1.0,
            v.loss,
        )
        for (client, v), size in zip(told, sizes, strict=True)
    )


def mean_loss(counts: Sequence[Count]) -> float:
    """None further from 0 than `MOST` times the middle one."""
    most = MOST * middle([abs(c.loss) for c in counts])
    return math.fsum(c.weight * min(max(c.loss, -most), most) for c in counts)


def gained(before: Sequence[Count], after: Sequence[Count]) -> float:
    """How much the loss fell, by the words of those who judged both; minus infinity of nobody's.

    The losses are compared validator by validator, so that one who has left changes nothing.
    """
    first = {c.client: c.loss for c in before}
    both = [(c.weight, first[c.client] - c.loss) for c in after if c.client in first]
    if not both:
        return -math.inf
    most = middle([abs(fell) for _, fell in both])
    total = math.fsum(weight for weight, _ in both)
    return math.fsum(w * min(max(fell, -most), most) for w, fell in both) / total
