"""Data: what a client trains on, named by a spec such as `digits`, `mnist:DIR` or `module:object`.

Built-in sources live in `sources.py` and `tabular.py` and give tensors, kept as they lie on disk
(pictures as bytes) until a client takes its shard. A user's own `module:object` may give a `Data`,
a pair (train, test) of torch Datasets, or one Dataset. Nothing here unpickles anything.
"""

import difflib
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from atoll.protocols import slots
from atoll.protocols.errors import DataError

Kind = Literal["classification", "regression", "text", "other"]
Indices = npt.NDArray[np.int64]

# Each takes (what stands after the colon, the options, the seed of its split) and gives a Data.
BUILTIN = {
    "digits": "atoll.client.sources:digits",
    "mnist": "atoll.client.sources:mnist",
    "cifar10": "atoll.client.sources:cifar10",
    "text": "atoll.client.sources:text",
    "topics": "atoll.client.topics:topics",
    "npz": "atoll.client.sources:npz",
    "synthetic": "atoll.client.sources:synthetic",
    "csv": "atoll.client.tabular:table",
}
OPTION = re.compile(r",\s*([A-Za-z_]\w*)=")


@dataclass(frozen=True, slots=True)
class DataInfo:
    """What a model must know of the data to have the right shape."""

    shape: tuple[int, ...]  # of one example, without the batch: (1, 28, 28); text: (context,)
    classes: int  # outputs of the model; 1 for regression, the vocabulary's size for text
    kind: Kind = "classification"
    vocabulary: str = ""  # text: the characters, character i is token i


@dataclass(frozen=True, slots=True)
class Split:
    """Examples as two tensors of equal length; `x` is made from `raw` when it is asked for."""

    raw: Tensor  # (n, *shape), e.g. uint8 pictures: a quarter of the memory
    y: Tensor  # (n,) int64 classes; text: (n, context) int64; regression: (n,) float32
    mean: float = (
        0.0  # x = (raw * scale - mean) / std, for bytes and floats; tokens stay as they are
    )
    std: float = 1.0
    scale: float = 1.0

    def __len__(self) -> int:
        return len(self.y)

    @property
    def x(self) -> Tensor:
        """(n, *shape), float32, or int64 where these are tokens. Made anew at each look."""
        if self.raw.dtype == torch.int64:
            return self.raw
        x = self.raw.to(torch.float32)
        if (self.mean, self.std, self.scale) == (0.0, 1.0, 1.0):
            return x
        return x.mul(self.scale / self.std).sub_(self.mean / self.std)

    def take(self, indices: Indices) -> "Split":
        """The examples at `indices`, copied, so that the rest can be let go."""
        at = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
        return Split(self.raw[at], self.y[at], self.mean, self.std, self.scale)


Examples = Split | Dataset[Any]


@dataclass(frozen=True, slots=True)
class Data:
    """Training and test examples. `columns` are raw values of the training rows, to split by."""

    info: DataInfo
    train: Examples
    test: Examples | None = None
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def labels(self, wanted: bool = True) -> npt.NDArray[Any]:
        """The training labels, (n,); only their number is right where they are not `wanted`."""
        if not wanted:
            return np.zeros(size(self.train), dtype=np.int64)
        if isinstance(self.train, Split):
            return self.train.y.numpy()
        return _labels(self.train)

    def shard(self, indices: Indices) -> Examples:
        """One client's part of the training examples."""
        if isinstance(self.train, Split):
            return self.train.take(indices)
        return Subset(self.train, indices.tolist())


def find_data(spec: str) -> None:
    """Whether there is what `spec` names: as `load_data`, without reading it."""
    name, _, rest = spec.partition(":")
    if name not in BUILTIN and rest:
        slots.find("data", spec, {})
        return
    path = _options(rest)[0]
    if name not in BUILTIN or (path and not is_there(Path(path))):
        load_data(spec)  # it knows better, and says what is wrong


def load_data(spec: str, seed: int = 0) -> Data:
    """The data that `spec` names; `seed` draws the split of sources that have none of their own.

    Every process of a run calls it with the same spec and the default seed, so that all hold the
    same split. Raises DataError FL-D101 (not found), FL-D102 (malformed), FL-D103 (no such source),
    FL-D105 (not enough), and UsageError FL-S103 for a user's module that cannot be imported.
    """
    name, _, rest = spec.partition(":")
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
        source: Callable[[str, dict[str, str], int], Data]
        source = getattr(importlib.import_module(module), attribute)
        path, options = _options(rest)
        return source(path, options, seed)
    if not rest or "/" in rest.partition(":")[0]:
        near = difflib.get_close_matches(name, sorted(BUILTIN), 1)
        raise DataError(
            "FL-D103",
            f"unknown data source {spec!r}",
            (f"did you mean {near[0]!r}? " if near else "")
            + f"known: {', '.join(sorted(BUILTIN))}; or your own as module:object",
        )
    return from_user(slots.resolve("data", spec, {}), spec, seed)


def from_user(found: object, spec: str, seed: int) -> Data:
    """A `Data` from what a user's object gave: Data, (train, test) Datasets, or one Dataset."""
    if isinstance(found, Data):
        return found
    with slots.own_code("data", spec, "read"):
        return _from_datasets(found, spec, seed)


def _from_datasets(found: object, spec: str, seed: int) -> Data:
    train: Dataset[Any]
    test: Dataset[Any]
    if isinstance(found, tuple) and len(found) == 2 and all(_is_dataset(part) for part in found):
        train, test = found
    elif _is_dataset(found):
        kept, held = holdout(size(found), seed)
        train, test = Subset(found, kept.tolist()), Subset(found, held.tolist())
    else:
        raise DataError(
            "FL-D103",
            f"{spec!r} gave {type(found).__name__}",
            "return atoll.client.Data, a pair (train, test) of torch Datasets, or one Dataset",
        )
    if min(size(train), size(test)) < 1:
        raise DataError("FL-D105", f"{spec!r} gave an empty dataset", "give at least 5 examples")
    return Data(_infer(train), _tensors(train), _tensors(test))


def is_there(path: Path) -> bool:
    """Not where its name can be none: too long, or with a NUL."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def size(examples: Examples) -> int:
    return len(examples)  # type: ignore[arg-type]  # torch's Dataset declares no __len__


def holdout(
    n: int, seed: int, share: float = 0.2, labels: npt.NDArray[Any] | None = None
) -> tuple[Indices, Indices]:
    """(train, test) indices, sorted, drawn by `seed`; each label gives its share where given."""
    rng = np.random.default_rng(seed)
    groups = (
        [np.arange(n)] if labels is None else [np.flatnonzero(labels == v) for v in _unique(labels)]
    )
    held = [rng.permutation(group)[: round(share * len(group))] for group in groups]
    test = np.sort(np.concatenate([*held, np.arange(0)])).astype(np.int64)  # of no example too
    return np.setdiff1d(np.arange(n, dtype=np.int64), test), test


def _unique(labels: npt.NDArray[Any]) -> list[Any]:
    return list(np.unique(labels))


def _options(rest: str) -> tuple[str, dict[str, str]]:
    """`"FILE,target=y"` -> ("FILE", {"target": "y"}); a path may have commas of its own."""
    first = OPTION.search("," + rest)
    if first is None:
        return rest, {}
    path = rest[: max(first.start() - 1, 0)]
    parts = OPTION.split(("," + rest)[first.start() :])[1:]
    return path, {k: v.strip() for k, v in zip(parts[::2], parts[1::2], strict=True)}


def _is_dataset(found: object) -> "TypeGuard[Dataset[Any]]":
    return (
        hasattr(found, "__getitem__")
        and hasattr(found, "__len__")
        and not isinstance(found, tuple | list | dict | str)
    )


def _tensors(dataset: Dataset[Any]) -> Examples:
    """A TensorDataset of (x, y) as a Split, which needs no loader; anything else as it is."""
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        x, y = dataset.tensors
        return Split(x, y)
    return dataset


def _infer(dataset: Dataset[Any]) -> DataInfo:
    """Shape and classes, from the first item and the labels."""
    item = dataset[0]
    if not isinstance(item, tuple | list) or len(item) != 2 or not hasattr(item[0], "shape"):
        return DataInfo((), 0, "other")
    shape = tuple(int(n) for n in item[0].shape)
    target = torch.as_tensor(item[1])
    if target.is_floating_point():
        return DataInfo(shape, max(1, target.numel()), "regression")
    named = getattr(dataset, "classes", None)
    return DataInfo(shape, len(named) if named else int(_labels(dataset).max()) + 1)


def _labels(dataset: Dataset[Any]) -> npt.NDArray[Any]:
    """(n,) labels: `targets` as torchvision has it, else by reading every item once."""
    if isinstance(dataset, Subset):
        return _labels(dataset.dataset)[np.asarray(dataset.indices, dtype=np.int64)]
    targets = getattr(dataset, "targets", None)
    if targets is not None:
        return np.asarray(targets)
    return np.asarray([int(dataset[i][1]) for i in range(size(dataset))])
