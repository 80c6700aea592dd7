"""Partition: which training examples each client holds.

    iid            equal shares at random
    contiguous     equal shares as they lie (what `iid` means for text)
    classes:K      each client holds K of the classes
    dirichlet:A    each class is cut by shares drawn from Dirichlet(A); small A: very unequal
    quantity:A     shares of all examples drawn from Dirichlet(A): unequal sizes, equal mixtures
    column:NAME    by the values of a column, e.g. one site a client

Every example goes to exactly one client, and the same arguments give the same parts everywhere.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from atoll.client.data import Data, Indices
from atoll.client.partspec import KNOWN, impossible, parse

LEAST = 10  # examples a client must get from a random draw, as in the papers' code
TRIES = 1000

Labels = npt.NDArray[Any]


def partition(
    spec: str, labels: Labels, clients: int, seed: int, sites: Sequence[str] | None = None
) -> list[Indices]:
    """Sorted indices of each client's examples; `labels` (n,), `sites` (n,) for `column:`.

    Raises DataError FL-D104 where the parts cannot be made.
    """
    asked = parse(spec)
    if clients < 1 or len(labels) < clients:
        raise impossible(f"{len(labels)} examples for {clients} clients", "use fewer clients")
    rng = np.random.default_rng(seed)
    match asked.name:
        case "iid":
            parts = np.array_split(rng.permutation(len(labels)), clients)
        case "contiguous":
            parts = np.array_split(np.arange(len(labels)), clients)
        case "classes":
            parts = _by_classes(labels, clients, asked.number, rng)
        case "dirichlet":
            parts = _dirichlet(labels, clients, asked.number, rng)
        case "quantity":
            parts = _dirichlet(np.zeros(len(labels)), clients, asked.number, rng)
        case _:
            parts = _by_sites(asked.column, sites, clients)
    return [np.sort(part).astype(np.int64) for part in parts]


def shard_of(data: Data, spec: str, shard: tuple[int, int], seed: int) -> Indices:
    """The examples of client `shard[0]` of `shard[1]`, counted from 0."""
    at, clients = shard
    if not 0 <= at < clients:
        raise impossible(f"shard {at} of {clients}", "shards are counted from 0")
    return shards_of(data, spec, clients, seed)[at]


def shards_of(data: Data, spec: str, clients: int, seed: int) -> list[Indices]:
    """The examples of each of so many clients."""
    name, _, column = spec.partition(":")
    labelled = name in ("classes", "dirichlet")
    if labelled and data.info.kind != "classification":
        raise impossible(f"{spec!r} needs classes, the data is {data.info.kind}", f"use {KNOWN}")
    if name == "iid" and data.info.kind == "text":
        spec = "contiguous"  # neighbouring windows belong together
    sites = data.columns.get(column) if name == "column" else None
    if name == "column" and sites is None:
        known = ", ".join(sorted(data.columns)) or "none"
        raise impossible(f"the data has no column {column!r}", f"its columns: {known}")
    return partition(spec, data.labels(labelled), clients, seed, sites)


def _by_classes(labels: Labels, clients: int, k: float, rng: np.random.Generator) -> list[Indices]:
    """Client i holds classes i*k to i*k + k - 1, around a circle of the classes in random order."""
    classes = rng.permutation(np.unique(labels))
    count, each = len(classes), int(k)
    if each > count or clients * each < count:
        raise impossible(
            f"{clients} clients of {each} classes cannot share {count} classes",
            f"use classes:K with K from {-(-count // clients)} to {count}",
        )
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    for at, value in enumerate(classes):
        holders = [i for i in range(clients) if (at - i * each) % count < each]
        examples = rng.permutation(np.flatnonzero(labels == value))
        if len(examples) < len(holders):
            raise impossible(
                f"class {value} has {len(examples)} examples for {len(holders)} clients",
                "use fewer clients or a smaller K",
            )
        for i, piece in zip(holders, np.array_split(examples, len(holders)), strict=True):
            parts[i].append(piece)
    return [np.concatenate(pieces) for pieces in parts]


def _dirichlet(labels: Labels, clients: int, a: float, rng: np.random.Generator) -> list[Indices]:
    """Shares p ~ Dir(a) of each class, cut at cumsum(p); drawn again until each client has LEAST.

    The shares are drawn and counted first and examples shuffled once, which is the same
    distribution and cheap to try often.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if len(labels) < LEAST * clients:
        raise impossible(
            f"{len(labels)} examples for {clients} clients of at least {LEAST}", "use fewer clients"
        )
    for _ in range(TRIES):
        shares = rng.dirichlet(np.full(clients, a), size=len(classes))  # (classes, clients)
        cuts = (np.cumsum(shares, axis=1) * counts[:, None]).astype(np.int64)
        cuts[:, -1] = counts
        if np.diff(cuts, axis=1, prepend=0).sum(axis=0).min() >= LEAST:
            break
    else:
        raise impossible(
            f"dirichlet({a}) left a client under {LEAST} examples in each of {TRIES} draws",
            "use a larger A or fewer clients",
        )
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    for value, cut in zip(classes, cuts, strict=True):
        examples = rng.permutation(np.flatnonzero(labels == value))
        for part, piece in zip(parts, np.split(examples, cut[:-1]), strict=True):
            part.append(piece)
    return [np.concatenate(pieces) for pieces in parts]


def _by_sites(column: str, sites: Sequence[str] | None, clients: int) -> list[Indices]:
    """Whole sites to clients, the largest first, each to whom has least so far."""
    if sites is None:
        raise impossible(f"no column {column!r} to split by", "use data with that column")
    names, at, counts = np.unique(np.asarray(sites), return_inverse=True, return_counts=True)
    if len(names) < clients:
        raise impossible(
            f"column {column!r} has {len(names)} values for {clients} clients", "use fewer clients"
        )
    held = [0] * clients
    owner = np.zeros(len(names), dtype=np.int64)
    for site in np.argsort(-counts, kind="stable"):
        owner[site] = held.index(min(held))
        held[owner[site]] += int(counts[site])
    return [np.flatnonzero(owner[at] == i) for i in range(clients)]
