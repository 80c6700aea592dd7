"""Objectives: the loss of a batch and the score of a test split, by the kind of the data.

A model that has `training_loss(batch) -> scalar Tensor` computes its own loss, from batches of any
form; it is scored by the mean of that loss.
"""

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from atoll.client.batches import Batch
from atoll.client.data import Kind


def loss_of(model: nn.Module, batch: Batch, kind: Kind) -> Tensor:
    """Mean loss of `batch`: cross entropy for classes and characters, else squared error."""
    own = getattr(model, "training_loss", None)
    if own is not None:
        return cast("Tensor", own(batch))
    x, y = batch
    return _loss(model(x), y, kind)


def score(model: nn.Module, stream: Iterator[Batch], kind: Kind) -> dict[str, float]:
    """Loss and examples; accuracy of classes and characters, perplexity of characters."""
    losses, right, answers, examples = 0.0, 0, 0, 0
    for batch in stream:
        if hasattr(model, "training_loss"):
            n = _examples(batch)
            losses, answers = losses + loss_of(model, batch, kind).item() * n, answers + n
            examples += n
            continue
        x, y = batch
        out = model(x)
        losses += _loss(out, y, kind).item() * y.numel()
        answers, examples = answers + y.numel(), examples + len(y)
        if kind != "regression":
            right += int((out.argmax(-1) == y).sum())
    found = {"loss": losses / max(1, answers), "examples": float(examples)}
    if hasattr(model, "training_loss") or kind == "regression":
        return found
    found["accuracy"] = right / max(1, answers)
    if kind == "text":
        found["perplexity"] = math.exp(min(found["loss"], 700.0))
    return found


def _loss(out: Tensor, y: Tensor, kind: Kind) -> Tensor:
    if kind == "regression":
        return functional.mse_loss(out.reshape(y.shape), y)
    if y.dim() > 1:  # (batch, context, vocabulary) against (batch, context)
        out, y = out.flatten(0, -2), y.flatten()
    return functional.cross_entropy(out, y)


def _examples(batch: Batch) -> int:
    """Examples in a batch of any form: the length of the first tensor in it."""
    while not isinstance(batch, torch.Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return len(batch)
