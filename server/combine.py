"""Combine: the part of a merge that makes one delta out of many, tile by tile.

A plan is made once for a merge: it does what must be known before the first tile (distances, the
fall-back to the mean), and is then asked for any tile, from any thread.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from atoll.aggregation.aggregator import (
    Aggregator,
    SetAggregator,
    StackRule,
    SumAggregator,
    TileRule,
    anchored,
    by_stack,
    by_tiles,
    is_asking,
    remembers,
)
from atoll.aggregation.mean import Mean
from atoll.aggregation.proxy import InterruptedMergeError
from atoll.aggregation.stack import Reported
from atoll.protocols.codecs import TILE, Decoder, accumulate, all_finite
from atoll.protocols.errors import RAISED, AtollError, ServerError, UsageError
from atoll.server.passes import Area, Crew, NotFiniteError, Reading, scratch, zeros

MEAN = Mean()
MEMORY = "memory"  # the vector of a version's state in which a rule's last result lies
DECODED = 1 << 24  # elements of all updates together that a thread may hold decoded

Tile = Callable[[int, int, Tensor, Tensor, Area], None]  # (lo, hi, anchor, out: the delta, area)


@dataclass(slots=True)
class Source:
    """One update, or a row like one: how it is read, and the strategy's weight of it."""

    id: str
    decoder: Decoder
    weight: float


@dataclass(slots=True)
class Plan:
    """How the deltas of one merge become one."""

    tile: Tile
    damping: float = 1.0  # what its result is to be multiplied with
    largest: int | None = TILE  # elements that `tile` may be asked for at once; None: it needs all
    robust: bool = False  # buffers are merged by their median
    remembers: bool = False  # the result, before damping, is to be written as MEMORY
    stats: Mapping[str, float] = field(default_factory=dict)


def plan(
    aggregator: Aggregator,
    sources: Sequence[Source],
    crew: Crew,
    count: int,
    memory: Tensor | None = None,
    anchor: Tensor | None = None,
    told: Mapping[str, float] = MappingProxyType({}),
) -> Plan:
    """The plan for `sources`, vectors of `count` elements; `memory`: the last result, if any;
    `anchor`: the model, which a rule may want as a row. `told`: the stats of this merge as it was
    made before, from which a rule that asked clients has its coefficients.

    NotFiniteError where a rule that measures first meets NaN or Inf.
    """
    if aggregator.algebra == "sum":
        return Plan(summed(aggregator, [(s.decoder, s.weight) for s in sources]))
    total = math.fsum(s.weight for s in sources)
    voters = [s for s in sources if s.weight > 0]
    weights = [s.weight / total for s in voters]
    damping = min(1.0, total)
    if len(voters) < max(1, aggregator.min_results):
        mean = summed(MEAN, [(s.decoder, w) for s, w in zip(voters, weights, strict=True)])
        return Plan(mean, damping, stats={"fallback": 1.0})
    if by_stack(aggregator):
        more = _more_rows(aggregator, memory, anchor)
        return _measured(aggregator, voters, weights, damping, crew, count, more, told)
    assert by_tiles(aggregator), "a rule over the set has combine() or coefficients()"
    largest = max(1, DECODED // len(voters)) if aggregator.coordinatewise else None
    tile = _ruled(aggregator, [s.decoder for s in voters], weights)
    return Plan(tile, damping, largest, _robust(aggregator))


def _measured(
    rule: StackRule,
    voters: Sequence[Source],
    weights: Sequence[float],
    damping: float,
    crew: Crew,
    count: int,
    more: Sequence[Decoder],
    told: Mapping[str, float],
) -> Plan:
    decoders = [*(s.decoder for s in voters), *more]
    with _own_code(rule):
        if told and is_asking(rule):
            answer = rule.again(told, [s.id for s in voters])
        else:
            answer = rule.coefficients(Reading(crew, decoders, count), weights)
        found = [float(c) for c in answer]
    if len(found) != len(decoders):
        raise UsageError(
            "FL-S102",
            f"{type(rule).__name__}.coefficients gave {len(found)} for {len(decoders)} rows",
            "return one number for each row of the stack, in their order",
        )
    tile = summed(MEAN, [(d, c) for d, c in zip(decoders, found, strict=True) if c])
    rows: Mapping[str, Sequence[float]] = {"coefficient": found}
    stats: dict[str, float] = {}
    if isinstance(answer, Reported):
        rows, stats = answer.rows, dict(answer.stats)
    for name, values in rows.items():
        stats |= {f"{name}/{s.id}": value for s, value in zip(voters, values, strict=False)}
    return Plan(tile, damping, TILE, _robust(rule), remembers(rule), stats)


def _more_rows(rule: StackRule, memory: Tensor | None, anchor: Tensor | None) -> Sequence[Decoder]:
    """The rows of its stack after the updates."""
    if remembers(rule):
        return [zeros if memory is None else _lying(memory)]
    if anchored(rule):
        assert anchor is not None, "whoever merges under an anchored rule gives the model"
        return [_lying(anchor)]
    return []


def summed(rule: SumAggregator, terms: Sequence[tuple[Decoder, float]]) -> Tile:
    adds = isinstance(rule, Mean)  # what a packed update can do by itself, without being unpacked

    def tile(lo: int, hi: int, anchor: Tensor, out: Tensor, area: Area) -> None:
        spare = scratch(area, "decoded", hi - lo)
        if not terms:
            out.zero_()
        for i, (decode, weight) in enumerate(terms):
            if i and adds:
                accumulate(decode, lo, hi, out, weight, spare)
            else:
                delta = decode(lo, hi, spare)
                with _own_code(rule):
                    rule.add(out, delta, weight, first=i == 0)

    return tile


def _ruled(rule: TileRule, decoders: Sequence[Decoder], weights: Sequence[float]) -> Tile:
    def tile(lo: int, hi: int, anchor: Tensor, out: Tensor, area: Area) -> None:
        deltas = [
            decode(lo, hi, scratch(area, f"decoded{i}", hi - lo))
            for i, decode in enumerate(decoders)
        ]
        if not all(all_finite(delta) for delta in deltas):  # a median would hide it
            raise NotFiniteError
        with _own_code(rule):
            found = rule.combine(anchor, deltas, weights)
            if found.shape != out.shape:  # would be spread over all elements without a word
                raise ValueError(f"combine gave {tuple(found.shape)} for {tuple(out.shape)} values")
            out.copy_(found)

    return tile


@contextmanager
def _own_code(rule: Aggregator) -> Iterator[None]:
    """What a rule raises by mistake ends its run as an error of its own: ServerError FL-S204."""
    try:
        yield
    except (AtollError, NotFiniteError, InterruptedMergeError):
        raise
    except RAISED as error:  # a user's code may raise anything
        raise ServerError(
            "FL-S204",
            f"aggregator {type(rule).__name__} failed: {type(error).__name__}: {error}",
            "mend it: `check_aggregator` of atoll.aggregation tries it on 200 merges",
        ) from error


def _robust(rule: SetAggregator) -> bool:
    return bool(getattr(rule, "robust", False))


def _lying(vector: Tensor) -> Decoder:
    def decode(lo: int, hi: int, out: Tensor) -> Tensor:
        return vector[lo:hi]

    return decode
