"""Central differential privacy: no update longer than `clip`, and noise over the sum of them.

McMahan et al. 2018, https://arxiv.org/abs/1710.06963; the adaptive clip is Andrew et al. 2021,
https://arxiv.org/abs/1905.03871: it follows a quantile of the updates' lengths, of which a noisy
count is learned in each version, at no further cost in epsilon.

What one client can move is the length of its update times its weight. So noise is as the greatest
weight of a merge: where an asynchronous strategy damps stale work, or merges one update alone with
a small weight, the noise shrinks with it and the cost stays what it is. All updates of one client
in a merge count together.

Neighbours are two runs of which one has zeros instead of one client's updates. Who takes part and
when, and how many examples each says it has, is not protected.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from atoll.aggregation import noise
from atoll.aggregation.aggregator import Aggregator
from atoll.aggregation.half import Half
from atoll.aggregation.mean import Mean
from atoll.aggregation.robust import within
from atoll.protocols.errors import UsageError
from atoll.protocols.manifest import Manifest
from atoll.server.accountant import Accountant, Sampling
from atoll.server.books import Books
from atoll.server.combine import MEAN, Plan, Source, summed
from atoll.server.dp import CentralDP
from atoll.server.passes import Area, Crew, Reading


class Privacy:
    """Central DP at work in one run. Stateless: what it must remember are the `Books`."""

    def __init__(self, params: CentralDP, key: bytes, sampling: Sampling | None = None) -> None:
        """`key`: 32 secret bytes of the run. UsageError FL-S104: no version fits into epsilon."""
        self.params, self.sampling = params, sampling
        self._key = key
        self.accountant = Accountant(params.noise, params.delta, sampling)
        first = self.accountant.next(self.opened())
        if params.epsilon is not None and first > params.epsilon:
            raise UsageError(
                "FL-S104",
                f"one version with noise={params.noise:g} costs epsilon {first:.4g}, and "
                f"{params.epsilon:g} is the most allowed",
                "give more noise, or a greater epsilon",
            )

    def opened(self) -> Books:
        """The books of a run that begins."""
        return Books(self.params.clip)

    def refused(self, books: Books, clients: Sequence[str]) -> list[bool]:
        """Which of these clients' updates would cost more than is left."""
        limit = self.params.epsilon
        if limit is None:
            return [False] * len(clients)
        if self.sampling is not None:
            return [self.accountant.next(books) > limit] * len(clients)
        room = self.accountant.room(limit)
        return [books.spent.get(c, 0.0) + self.accountant.cost > room for c in clients]

    def over(self, books: Books) -> bool:
        """Whether another version may cost some client more than is left."""
        limit = self.params.epsilon
        return limit is not None and self.accountant.next(books) > limit

    def plan(
        self,
        version: int,
        sources: Sequence[Source],
        clients: Sequence[str],
        crew: Crew,
        count: int,
        books: Books,
    ) -> tuple[Plan, Books]:
        """How `sources`, vectors of `count` elements, become one, and the books afterwards.

        NotFiniteError where an update holds NaN or Inf.
        """
        key = noise.derived(self._key, version, noise.ids([(s.id, s.weight) for s in sources]))
        shares = self._shares([s.weight for s in sources], clients)
        per_client: dict[str, float] = {}
        for client, share in zip(clients, shares, strict=True):
            per_client[client] = per_client.get(client, 0.0) + abs(share)
        greatest = self._share if self.sampling else max(per_client.values(), default=0.0)
        lengths = Reading(crew, [s.decoder for s in sources], count).squares().sqrt()
        factors = within(lengths, books.clip).tolist()
        terms = [
            (s.decoder, share * factor)
            for s, share, factor in zip(sources, shares, factors, strict=True)
        ]
        z, count_noise = self._split(len(per_client))
        std = z * books.clip * greatest
        stats = {"dp_clip": books.clip, "dp_noise": std}
        closed = self._charge(books, per_client, greatest, z, count_noise)
        if self.params.adaptive:
            share = self._share_below(lengths, clients, books.clip, count_noise, key)
            stats["dp_below"] = share
            moved = math.exp(-self.params.rate * (share - self.params.quantile))
            closed = replace(closed, clip=books.clip * moved)
        stats["epsilon"] = self.accountant.epsilon(closed)
        stats["budget_spent"] = float(self.over(closed))
        total = summed(MEAN, terms)
        hidden = noise.derived(key, "delta")

        def tile(lo: int, hi: int, anchor: Tensor, out: Tensor, area: Area) -> None:
            total(lo, hi, anchor, out, area)
            if std:
                noise.add_(out, hidden, std, lo)

        return Plan(tile, stats=stats), closed

    @property
    def _share(self) -> float:
        assert self.sampling is not None
        return 1 / (self.sampling.rate * self.sampling.population)

    def _shares(self, weights: Sequence[float], clients: Sequence[str]) -> list[float]:
        """The weight of each update, so that no client's depends on what others sent."""
        times = Counter(clients)
        if self.sampling is not None:
            return [self._share / times[c] for c in clients]
        if self.params.weights == "uniform":
            each = math.fsum(weights) / max(1, len(times))
            return [each / times[c] for c in clients]
        sums: dict[str, float] = {}
        for client, weight in zip(clients, weights, strict=True):
            sums[client] = sums.get(client, 0.0) + abs(weight)
        cap = self.params.cap
        cut = {c: cap / total if total > cap else 1.0 for c, total in sums.items()}
        return [w * cut[c] for w, c in zip(weights, clients, strict=True)]

    def _split(self, clients: int) -> tuple[float, float]:
        """(noise of the sum, noise of the count) which together cost what z alone does."""
        z = self.params.noise
        if not self.params.adaptive or z == 0:
            return z, 0.0
        expected = self.sampling.rate * self.sampling.population if self.sampling else clients
        count_noise = self.params.count_noise or max(expected / 20, z)
        return (z**-2 - (2 * count_noise) ** -2) ** -0.5, count_noise

    def _charge(
        self,
        books: Books,
        weights: Mapping[str, float],
        greatest: float,
        z: float,
        count_noise: float,
    ) -> Books:
        """Each pays as it moved the sum, against the noise over it."""
        if self.sampling is not None:
            return replace(books, rounds=books.rounds + 1)
        spent = dict(books.spent)
        for client, weight in weights.items():
            moved = weight / greatest if greatest else 0.0
            cost = (moved / z) ** 2 if z else math.inf
            cost += (2 * count_noise) ** -2 if count_noise else 0.0
            spent[client] = spent.get(client, 0.0) + cost
        return replace(books, spent=spent)

    def _share_below(
        self, lengths: Tensor, clients: Sequence[str], clip: float, std: float, key: bytes
    ) -> float:
        """The noisy share of clients whose updates were not cut; each counts +-1/2 at most."""
        times = Counter(clients)
        below = (lengths <= clip).tolist()
        bits = math.fsum((b - 0.5) / times[c] for b, c in zip(below, clients, strict=True))
        bits += std * noise.one(noise.derived(key, "count"))
        expected = self.sampling.rate * self.sampling.population if self.sampling else len(times)
        return 0.5 + bits / max(1, expected)


def fits(
    aggregator: Aggregator, manifest: Manifest, buffers: str, half: Half | None = None
) -> None:
    """UsageError FL-S104 for what central DP cannot protect."""
    if not isinstance(aggregator, Mean):
        raise UsageError(
            "FL-S104",
            f"--dp needs a plain sum, and {type(aggregator).__name__} lets one client move the "
            "others' shares",
            "use --aggregator mean, or noise on the clients: --local-dp",
        )
    if half is not None and half.up:
        raise UsageError(
            "FL-S104",
            f"--dp does not cover what clients send beside updates for {type(half).__name__}: "
            f"{', '.join(half.up)}",
            "take --local plain, fedprox or fedavg-m",
        )
    counted = manifest.counts["buffers_float"] + manifest.counts["buffers_other"]
    if counted and buffers == "weighted_mean":
        raise UsageError(
            "FL-S104",
            "--dp does not cover the model's buffers (BatchNorm statistics), and --buffers "
            "weighted_mean would merge them as they are",
            "give --buffers keep_server, or use GroupNorm",
        )
