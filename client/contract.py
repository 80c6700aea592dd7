"""Contract: a trainer is asked here; what it raises or returns amiss is told as its own.

Whoever wrote it reads one line that says which method did what (FL-C104), in a run, a simulation, a
test and on a server alike, and never of a bug of ours.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import index
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from atoll.client.heldout import Validator
from atoll.client.trainer import Task, Tensors, Trained, Trainer
from atoll.protocols.bounds import MAX_METRICS, METRIC, SHARES
from atoll.protocols.errors import RAISED, AtollError, ClientError
from atoll.protocols.events import MAX_COUNT

T = TypeVar("T")

JUDGED = "return (loss, examples, gradient): see atoll.client.heldout.Validator"
RETURN = "return a Trained of atoll.client: (tensors, steps, examples, metrics)"


class Judge(Protocol):
    """Something that knows test data: a `Trainer` is one."""

    def load(self, tensors: Tensors) -> None: ...

    def evaluate(self) -> Mapping[str, float]: ...


def load(judge: Judge, tensors: Tensors) -> None:
    """ClientError FL-C103 where they do not fit, as the trainer says by ValueError; FL-C104.

    They are the judge's own from now on, unless it says that it only reads them: an update is the
    difference to them, and one that trains in place would change both sides of it.
    """
    if not getattr(judge, "reads_only", False):
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    with _told("load"):
        try:
            judge.load(tensors)
        except ValueError as error:
            raise ClientError(
                "FL-C103",
                f"the trainer does not fit the run's model: {error}",
                "give this client the run's model: see `fl-client test`",
            ) from error


def train(trainer: Trainer, task: Task) -> Trained:
    """ClientError FL-C104."""
    with _told("train"):
        made: object = trainer.train(task)
    if not isinstance(made, Trained):
        raise _broken(f"train() returned {_kind(made)}, not a Trained", RETURN)
    for part, given in (("tensors", made.tensors), ("metrics", made.metrics)):
        if type(given) is not dict and not isinstance(given, Mapping):
            raise _broken(f"train() returned {part} as {_kind(given)}", "give {name: value}")
    for name, value in made.tensors.items():
        if not isinstance(value, Tensor):
            hint = "give torch Tensors, e.g. by torch.from_numpy"
            raise _broken(f"train() returned {name!r} as {_kind(value)}", hint)
    steps = _whole("train() gave steps", made.steps)
    examples = _whole("train() gave examples", made.examples)
    if steps is not made.steps or examples is not made.examples:  # numpy's, perhaps
        made = replace(made, steps=steps, examples=examples)
    if made.steps != task.steps and not (
        made.steps < task.steps and task.asked() in ("send", "drop")
    ):
        what = f"train() was asked for {task.steps} steps and ran {made.steps}"
        raise _broken(what, "run exactly task.steps, unless task.asked() says to stop")
    if made.metrics and any(type(value) is not float for value in made.metrics.values()):
        made = replace(made, metrics=_numbers("train", made.metrics))
    return made


def evaluate(judge: Judge) -> dict[str, float]:
    """ClientError FL-C104."""
    with _told("evaluate"):
        found: object = judge.evaluate()
    if not isinstance(found, Mapping):
        hint = "return {name: number}, or {} where there is no test data"
        raise _broken(f"evaluate() returned {_kind(found)}, not a mapping", hint)
    metrics = _numbers("evaluate", found)
    for name in SHARES:
        value = metrics.get(name, 0.0)
        if math.isfinite(value) and not 0.0 <= value <= 1.0:  # else it is left out
            raise _broken(f"evaluate() gave {name}={value:g}", "give a share, from 0 to 1")
    count = metrics.get("examples", 0.0)
    if math.isfinite(count) and (count < 0 or count != int(count)):
        raise _broken(f"evaluate() gave examples={count:g}", "give a whole number")
    return metrics


def judge(
    validator: Validator, model: Mapping[str, Tensor], gradient: bool, batch_statistics: bool
) -> tuple[float, int, Tensor | None]:
    """Loss, examples, and the gradient where it is asked for, as long as the model's trainable
    part. ClientError FL-C104, or why it declines."""
    with _told("validator.judge"):
        found: object = validator.judge(model, gradient, batch_statistics)
    if not isinstance(found, tuple) or len(found) != 3:
        raise _broken(f"validator.judge() returned {_kind(found)}", JUDGED)
    loss = _as(float, "validator.judge() gave loss", found[0], "a number")
    count = _whole("validator.judge() gave examples", found[1])
    if count < 1:
        raise _broken(f"validator.judge() gave loss={loss} on {count} examples", JUDGED)
    if not gradient:
        return loss, count, None
    n, slope = model["trainable"].numel(), found[2]
    if not isinstance(slope, Tensor) or slope.shape != (n,) or slope.dtype != torch.float32:
        shown = f"{slope.dtype} {tuple(slope.shape)}" if isinstance(slope, Tensor) else _kind(slope)
        raise _broken(f"validator.judge() gave a gradient {shown}, not float32 ({n},)", JUDGED)
    return loss, count, slope.cpu().contiguous()


def examples(trainer: Trainer) -> int:
    """Its weight in an average, at least 1; where it says none, 1. ClientError FL-C104."""
    return _whole("examples", getattr(trainer, "examples", 1)) or 1


def said(method: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """What of its metrics a client says: the finite ones, a diverged model's loss being none.
    ClientError FL-C104 where a name cannot travel, or they are too many."""
    if len(metrics) > MAX_METRICS:
        raise _broken(f"{method}() gave {len(metrics)} metrics", f"give {MAX_METRICS} at most")
    for name in metrics:
        if not METRIC.fullmatch(name):
            hint = "name it by letters, digits and . _ / -, 64 at most"
            raise _broken(f"{method}() gave a metric {name!r}"[:120], hint)
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


class _told:  # noqa: N801  # a context manager; one of contextlib's takes three times as long
    """Tells what a trainer's method raises amiss."""

    def __init__(self, method: str) -> None:
        self._method = method

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, RAISED) and not isinstance(error, AtollError):
            hint = "mend it, its model or its data: -v shows where"
            raise _broken(f"{self._method}() failed: {error!r}", hint) from error


def _whole(name: str, value: object) -> int:
    """One that a message can say."""
    found = value if type(value) is int else _as(index, name, value, "a whole number")
    if not 0 <= found <= MAX_COUNT:
        raise _broken(f"{name}={found}"[:80], "give a number from 0 to 2**53")
    return found


def _numbers(method: str, metrics: Mapping[str, object]) -> dict[str, float]:
    """As floats: a tensor of one value is as good as one."""
    return {
        str(name): _as(float, f"{method}() gave {name}", value, "a number")
        for name, value in metrics.items()
    }


def _as(kind: Callable[..., T], name: str, value: object, want: str) -> T:
    try:
        return kind(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        shown = repr(value)
        raise _broken(f"{name}={shown[:60]}", f"give {want}") from error


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _broken(what: str, hint: str) -> ClientError:
    return ClientError("FL-C104", f"the trainer's {what}", hint)
