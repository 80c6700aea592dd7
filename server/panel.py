"""Panel: a version judged by the clients, each on its own test data, where the server has none.

A machine. One version is out at a time; those published meanwhile wait as one, the newest, so a
slow client skips versions and never piles up work: it is asked again when it has answered.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

Judged = tuple[int, dict[str, float]]  # a version and its metrics


@dataclass
class Panel:
    """`ask` says which version to send to whom, `asked`; `answer`, `gone` and `close` give its
    metrics, at last."""

    version: int | None = None  # out with the clients
    waiting: int | None = None  # the newest published meanwhile
    asked: set[str] = field(default_factory=set)  # who has not answered
    late: set[str] = field(default_factory=set)  # who has not answered about a former one
    answers: dict[str, tuple[dict[str, float], int]] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)  # of whom it was said that they lack a metric

    def offer(self, version: int) -> None:
        """A version could be judged."""
        if self.waiting is None or version > self.waiting:
            self.waiting = version

    def ask(self, clients: Collection[str]) -> int | None:
        """The version to send to those of these clients who are now `asked`; None: one is still
        out, or there is none, or nobody to ask."""
        free = set(clients) - self.late
        if self.version is not None or self.waiting is None or not free:
            return None
        self.version, self.waiting = self.waiting, None
        self.asked, self.answers = free, {}
        return self.version

    def answer(
        self, client: str, version: int, metrics: Mapping[str, float], examples: int
    ) -> Judged | None:
        """What one client found on `examples` examples; 0: it has no test data."""
        self.late.discard(client)
        if version != self.version or client not in self.asked:
            return None
        self.answers[client] = (dict(metrics), examples)
        return self.gone(client)

    def gone(self, client: str) -> Judged | None:
        """A client will not answer (any more). The version and its metrics, when all have or left:
        each the mean, weighted by examples, of those who measured it."""
        self.late.discard(client)
        self.asked.discard(client)
        return None if self.version is None or self.asked else self._mean()

    def close(self) -> Judged | None:
        """Wait no longer for who has not answered: now `late`. None where nobody judged it."""
        self.late |= self.asked
        self.asked = set()
        return None if self.version is None else self._mean()

    def _mean(self) -> Judged | None:
        assert self.version is not None
        version, self.version = self.version, None
        found = [(m, n) for _, (m, n) in sorted(self.answers.items()) if n > 0 and m]
        if not found:
            return None
        means = {}
        for key in sorted({key for m, _ in found for key in m}):
            measured = [(m[key], n) for m, n in found if key in m]
            means[key] = sum(x * n for x, n in measured) / sum(n for _, n in measured)
        return version, {**means, "examples": float(sum(n for _, n in found))}

    def lacking(self) -> dict[str, list[str]]:
        """Of the version judged last: metrics that a client did not measure, and others did. Each
        client is named once."""
        found = {c: set(m) for c, (m, n) in sorted(self.answers.items()) if n > 0 and m}
        every: set[str] = set().union(*found.values())
        new = {c: sorted(every - mine) for c, mine in found.items() if every - mine}
        new = {c: names for c, names in new.items() if c not in self.named}
        self.named |= new.keys()
        return new

    @property
    def busy(self) -> bool:
        """Whether a version is out with the clients."""
        return self.version is not None
