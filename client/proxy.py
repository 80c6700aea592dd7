"""Proxy data: a few labelled examples that a server learns by, named like other data.

    digits                          200 of the training examples, drawn evenly over the classes
    npz:mine.npz,take=400           so many; take=all: everything there is
    mnist:DIR,missing=ok           although a class is missing

They come from the training part of what is named, and none may lie in the run's test set: what a
model was fitted to says nothing of how good it is. A class that the proxy data lack has no voice,
and clients that hold it would be starved, so that is refused unless it is spelled out.
"""

import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from atoll.client.batches import in_order, mixed
from atoll.client.data import Data, DataInfo, Examples, Indices, Split, load_data, size
from atoll.protocols.errors import DataError

logger = logging.getLogger(__name__)

TAKEN = 200
LEAST_EACH = 10  # examples of a class; with fewer its clients' shares are mostly noise
IN_WORDS = {  # fields of DataInfo, the one that says most first
    "kind": "kind",
    "shape": "shape",
    "vocabulary": "set of characters",
    "classes": "number of classes",
}
OWN = re.compile(r"[,:](take|missing)=([^,]*)")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a spec of proxy data says."""

    source: str  # as for `load_data`
    take: int | None = TAKEN  # examples; None: all
    lacking: bool = False  # a class may be missing

    @classmethod
    def of(cls, spec: str) -> "Wanted":
        """DataError FL-D103."""
        given = dict(OWN.findall(spec))
        take, missing = given.get("take", str(TAKEN)), given.get("missing", "no")
        if take != "all" and not (take.isdecimal() and int(take) >= 2):
            raise DataError(
                "FL-D103",
                f"proxy data: take={take!r}",
                "write take=N with N of at least 2, or take=all",
            )
        if missing not in ("no", "ok"):
            raise DataError(
                "FL-D103", f"proxy data: missing={missing!r}", "write missing=ok, or drop it"
            )
        number = None if take == "all" else int(take)
        return cls(OWN.sub("", spec), number, missing == "ok")


def proxy_data(spec: str, run: Data | None, seed: int) -> Data:
    """The proxy data that `spec` names, checked against the test set of the `run`'s data.

    DataError FL-D103, FL-D106 (they overlap), FL-D107 (a class is missing), as `load_data` besides.
    """
    wanted = Wanted.of(spec)
    data = load_data(wanted.source)
    examples = data.shard(drawn(data, wanted.take, seed))
    return checked(Data(data.info, examples), run, wanted.lacking)


def held_out(spec: str, source: str, run: Data, seed: int) -> Data:
    """The run's data without what is taken as proxy data, where both come from one source."""
    wanted = Wanted.of(spec)
    if wanted.source != source:
        return run
    rest = np.setdiff1d(np.arange(size(run.train)), drawn(run, wanted.take, seed))
    if not len(rest):
        raise DataError(
            "FL-D105", f"proxy data {spec!r} are all there is to train on", "take fewer of them"
        )
    columns = {name: [values[i] for i in rest] for name, values in run.columns.items()}
    return replace(run, train=run.shard(rest), columns=columns)


def drawn(data: Data, take: int | None, seed: int) -> Indices:
    """Sorted indices of training examples: evenly over the classes as far as each has some."""
    n = size(data.train)
    rng = np.random.default_rng(mixed(seed, "proxy"))
    if take is None or take >= n:
        return np.arange(n, dtype=np.int64)
    if data.info.kind != "classification":
        return np.sort(rng.permutation(n)[:take]).astype(np.int64)
    labels = data.labels()
    order = rng.permutation(n)
    rank = np.empty(n, dtype=np.int64)  # of each example among those of its class
    for value in np.unique(labels):
        mine = order[labels[order] == value]
        rank[mine] = np.arange(len(mine))
    first = order[np.argsort(rank[order], kind="stable")]  # one of each class, then the next
    return np.sort(first[:take]).astype(np.int64)


def checked(data: Data, run: Data | None, lacking: bool = False) -> Data:
    """`data`, if a server may learn by its training examples."""
    if size(data.train) < 2:
        raise DataError("FL-D105", f"{size(data.train)} proxy examples", "give at least 2")
    if run is not None:
        data = _of_kind(data, run.info)
    if run is not None and run.test is not None:
        test = set(prints(run.test))
        common = sum(print_ in test for print_ in prints(data.train))
        if common:
            raise DataError(
                "FL-D106", f"{common} of {size(data.train)} proxy examples lie in the test set",
                "name proxy data apart from it: a model fitted to the test set cannot be judged",
            )  # fmt: skip
    if data.info.kind == "classification":
        _check_classes(data, lacking)
    return data


def _of_kind(data: Data, info: DataInfo) -> Data:
    """`data` with the classes of the run. A file whose last classes are missing looks as if it had
    fewer of them: that is for the check of classes to say. DataError FL-D106."""
    if data.info.kind == "classification" and data.info.classes < info.classes:
        data = replace(data, info=replace(data.info, classes=info.classes))
    for name, words in IN_WORDS.items():
        mine, its = getattr(data.info, name), getattr(info, name)
        if mine != its:
            raise DataError(
                "FL-D106",
                f"the proxy data's {words} is not the run's: {mine!r:.40}, not {its!r:.40}",
                "name proxy data of the same kind",
            )
    return data


def _check_classes(data: Data, lacking: bool) -> None:
    counts = np.bincount(data.labels().astype(np.int64), minlength=data.info.classes)
    missing = [str(i) for i in np.flatnonzero(counts == 0)]
    if missing and not lacking:
        raise DataError(
            "FL-D107",
            f"the proxy data lack class {', '.join(missing[:5])}: who holds it would be starved",
            "add examples of it, or say missing=ok",
        )
    few = [str(i) for i in np.flatnonzero(counts < LEAST_EACH)]
    if few:
        logger.warning(
            "proxy data: class %s has fewer than %d examples", ", ".join(few[:5]), LEAST_EACH
        )


def prints(examples: Examples) -> Iterator[bytes]:
    """A fingerprint of each example's input, whatever dtype it is kept in."""
    if isinstance(examples, Split):
        for batch, _ in in_order(examples, 1024, torch.device("cpu")):
            yield from (_print(x) for x in batch)
        return
    for i in range(size(examples)):
        item = examples[i]
        yield _print(item[0] if isinstance(item, tuple | list) and item else item)


def _print(x: object) -> bytes:
    if isinstance(x, Tensor | np.ndarray | float | int):
        tensor = torch.as_tensor(x)
        kept = tensor.to(torch.float64 if tensor.is_floating_point() else torch.int64)
        content = kept.contiguous().numpy().tobytes()
    else:
        content = repr(x).encode()
    return hashlib.blake2b(content, digest_size=16).digest()
