"""MNIST as the specs' recipes use it: whole or pooled pictures, and shards as a paper cuts them."""

import functools
from dataclasses import replace

import numpy as np
import torch
from recipe import DATA

from atoll.client.data import Data, DataInfo, Indices, Split, load_data

FOLDER = DATA / "mnist"
POOLED = "mlp:hidden=32"  # 196-32-10 on pooled pictures, 6,634 parameters


@functools.cache
def whole() -> Data:
    """28x28, 60,000 to train and 10,000 to test."""
    return load_data(f"mnist:{FOLDER}")


@functools.cache
def pooled() -> Data:
    """14x14: means of 2x2 pixels."""
    data = whole()
    assert isinstance(data.train, Split)
    assert isinstance(data.test, Split)
    return Data(DataInfo((1, 14, 14), 10), _pooled(data.train), _pooled(data.test))


def _pooled(split: Split) -> Split:
    return replace(split, raw=torch.nn.functional.avg_pool2d(split.raw.to(torch.float32), 2))


def class_partition(
    data: Data, clients: int, fewest: int, most: int, seed: int, owners: int = 1
) -> list[Indices]:
    """FedCompass, appendix: each client draws `fewest` to `most` classes uniformly, until each has
    so many `owners` (the paper: 1); a class is split among them as |N(10, 3)| draws.
    """
    rng = np.random.default_rng(seed)
    labels = data.labels()
    classes = np.unique(labels)
    while True:
        owned = [
            rng.choice(classes, rng.integers(fewest, most + 1), replace=False)
            for _ in range(clients)
        ]
        counts = [sum(value in some for some in owned) for value in classes]
        if min(counts) >= owners:
            break
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    for value in classes:
        holders = [i for i in range(clients) if value in owned[i]]
        shares = np.abs(rng.normal(10, 3, len(holders)))
        rows = rng.permutation(np.flatnonzero(labels == value))
        cuts = (np.cumsum(shares / shares.sum())[:-1] * len(rows)).astype(np.int64)
        for owner, piece in zip(holders, np.split(rows, cuts), strict=True):
            parts[owner].append(piece)
    return [np.sort(np.concatenate(pieces)) for pieces in parts]
