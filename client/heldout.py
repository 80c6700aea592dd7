"""Held out: examples that a client does not train on, by which it judges the models of a merge.

A server without data of its own (FedLAW's no_proxy=validators) asks its clients for the loss of a
model on such examples, and for its gradient. Which they are is drawn from (seed, client) alone, the
fewer among the more, and how many is kept in the client's folder: a client that starts again holds
out the same or less, and has trained on none of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from atoll.client.batches import mixed
from atoll.client.data import Examples, Indices, size
from atoll.client.flat import FlatModel
from atoll.client.room import disk, rewrite
from atoll.protocols import state
from atoll.protocols.errors import DataError, UsageError

SHARE = 0.1  # of a client's examples, where the run asks for validators
FEWEST = 10  # with fewer it declines: they say little, and a gradient of few tells of each
MOST = 1000  # more say little more, and take longer
FILE = "held.json"


class Validator(Protocol):
    """A trainer may have one, as `validator`."""

    def judge(
        self, model: Mapping[str, Tensor], gradient: bool, batch_statistics: bool
    ) -> tuple[float, int, Tensor | None]:
        """The mean loss of a model, over how many examples, and its gradient.

        `model`: flat vectors by group, "trainable" first. The gradient is as long as "trainable",
        and overwritten by the next. `batch_statistics`: BatchNorm takes those of the batch, not of
        the model. Called in a thread of its own. AtollError where it declines.
        """


class HeldOut:
    """A `Validator` by a flat copy of the model, which several of one process may share."""

    def __init__(self, flat: FlatModel | None, examples: Examples) -> None:
        """`flat` None: with too few examples none is needed."""
        self._flat, self._examples = flat, examples

    def judge(
        self, model: Mapping[str, Tensor], gradient: bool, batch_statistics: bool
    ) -> tuple[float, int, Tensor | None]:
        flat, n = self._flat, size(self._examples)
        if n < FEWEST:
            raise DataError(
                "FL-D105",
                f"{n} examples are held out, to judge a model takes {FEWEST}",
                "nothing: the run goes on without this client's judgement",
            )
        assert flat is not None, "whoever holds enough out brings a model"
        if flat.of is not self._examples:
            flat.use(self._examples)
        flat.normalise(batch_statistics)
        flat.begin({group: values for group, values in model.items() if group != "trainable"})
        flat.vector.copy_(model["trainable"])
        if not gradient:
            return flat.loss(), n, None
        loss, slope = flat.whole()
        return loss, n, slope


def cut(rows: Indices, share: float, seed: int, client: str) -> tuple[Indices, Indices]:
    """(what it trains on, what it holds out) of a client's rows, both sorted; `share` of them,
    MOST at most. None is held out where they would be fewer than FEWEST."""
    held = min(round(share * len(rows)), MOST)
    if held < FEWEST:
        return rows, rows[:0]
    order = np.random.default_rng(mixed(seed, client, "held out")).permutation(len(rows))
    return np.sort(rows[order[held:]]), np.sort(rows[order[:held]])


@dataclass(frozen=True, slots=True)
class _Held:
    """held.json: of which examples all but `share` may have been trained on in `run`."""

    run: str
    of: tuple[str, ...]
    share: float


def held_share(
    folder: Path | None, own: float | None, wish: float, run: str, of: tuple[str, ...]
) -> float:
    """How much of its examples a client is to hold out in `run`, before it trains on the rest.

    `own`: what its user gave; None: what the run wishes; nothing where the run would not ask.
    `of`: all that these examples, and the draw among them, depend on. `folder` None: this life is
    the only one. UsageError FL-S108 where that is more than it held out in its former lives: of
    the run's wish the lesser holds. ClientError FL-S203.
    """
    share = wish if own is None or not wish else own
    if folder is None:
        return share
    kept = _kept(folder / FILE)
    most = 1.0 if kept is None or kept.run not in ("", run) else kept.share * (kept.of == of)
    if share > most and own is not None:
        raise UsageError(
            "FL-S108",
            f"--validate {own:g}, but in this run this client may have trained on all but "
            f"{most:g} of these examples",
            f"give {most:g}{' or less' if most else ''}, or another --dir",
        )
    held = _Held(run, of, min(share, most))
    if held != kept:
        with disk(folder):
            rewrite(folder / FILE, state.dumps(held).encode(), durable=True)
    return held.share


def _kept(path: Path) -> _Held | None:
    """None where nothing is; one of any run, with nothing held out, where it cannot be read."""
    try:
        return state.loads(_Held, path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return _Held("", (), 0.0)
