"""Stacked: the local training of many clients at once, as batched matrix products.

For chains of Flatten, Linear and ReLU under cross-entropy, by plain SGD or Adam, FedProx too: what
simulations of many small clients train. With one thread of torch the numbers are those of one
client at a time, bit for bit: a batched product runs the same kernel on each of its matrices, and
everything else treats each number or each row alone. (With several threads torch cuts a single
large product, but not one of a batch, into pieces, and the last bits differ: by less than 1e-6 of
a weight and step.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from atoll.client.algorithm import FedProx, Plain
from atoll.client.batches import TensorBatches
from atoll.client.local import LocalConfig, TorchTrainer
from atoll.client.trainer import Task, Tensors, Trained

LEAST = 400  # multiplications in a product: torch does a smaller one of a batch by another kernel
MOST_ROWS = 256  # in a batch: up to there a mean loss is summed as `_losses` does it
CACHE = 12 << 20  # bytes of stacked models that are trained at a time: more leaves the cache
FEWEST, MOST = 8, 128  # clients at a time, whatever their models' size


class Work(NamedTuple):
    """One client's order."""

    trainer: TorchTrainer
    start: Tensors  # the model it is trained from
    task: Task


def fits(trainer: object) -> TypeGuard[TorchTrainer]:
    """Whether this trainer's work can be stacked with that of others like it."""
    if not isinstance(trainer, TorchTrainer) or type(trainer.algorithm) not in (Plain, FedProx):
        return False
    config, batches = trainer.config, trainer.batches
    return (
        isinstance(batches, TensorBatches)
        and batches.order.batch <= MOST_ROWS
        and trainer.kind == "classification"
        and config == LocalConfig(
            lr=config.lr, batch=config.batch, optimizer=config.optimizer,
            momentum=config.momentum, weight_decay=config.weight_decay, prox=config.prox,
            device=config.device, workers=config.workers,
        )
        and config.optimizer in ("sgd", "adam")
        and trainer.device.type == "cpu"
        and not trainer.slowdown
        and chain(trainer.model) is not None
        and all(
            p.numel() * batches.order.batch >= LEAST
            for p in trainer.model.parameters() if p.dim() == 2
        )
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layer:
    weight: str  # its name in the model
    bias: str | None
    relu: bool  # follows


def chain(model: nn.Module) -> list[Layer] | None:
    """The model's linear layers in their order; None where it is anything but a chain of them."""
    if not isinstance(model, nn.Sequential):
        return None
    layers: list[Layer] = []
    seen: set[int] = set()
    for name, module in model.named_children():
        own = [*module.parameters(), *module.buffers()]
        if seen.intersection(map(id, own)) or not all(p.requires_grad for p in own):
            return None  # tied, or frozen
        seen.update(map(id, own))
        if type(module) is nn.Linear:
            bias = None if module.bias is None else f"{name}.bias"
            layers.append(Layer(f"{name}.weight", bias, False))
        elif type(module) is nn.ReLU and layers and not layers[-1].relu:
            layers[-1] = replace(layers[-1], relu=True)
        elif not (type(module) is nn.Flatten and not layers and module.start_dim == 1):
            return None
    return layers if layers and not layers[-1].relu and _starts_flat(model) else None


def train(works: Sequence[Work]) -> list[Trained | None]:
    """What each order comes to; None where its loss is no longer a number: train that one alone.

    Every trainer must fit, and no client may occur twice.
    """
    alike: dict[object, list[int]] = {}
    for at, work in enumerate(works):
        alike.setdefault(_kind(work), []).append(at)
    found: list[Trained | None] = [None] * len(works)
    for places in alike.values():
        places.sort(key=lambda at: -works[at].task.steps)
        many = _at_a_time(works[places[0]].trainer)
        for first in range(0, len(places), many):
            some = places[first : first + many]
            for at, made in zip(some, _Stack([works[i] for i in some]).trained(), strict=True):
                found[at] = made
    return found


def _kind(work: Work) -> object:
    """Equal for those that can stand in one stack."""
    trainer = work.trainer
    modules = tuple(type(module) for module in trainer.model.children())
    return trainer.manifest, modules, trainer.config, trainer.batch, _mu(work)


def _mu(work: Work) -> float:
    algorithm = work.trainer.algorithm
    return work.task.extra.get("mu", algorithm.mu) if isinstance(algorithm, FedProx) else 0.0


def _at_a_time(trainer: TorchTrainer) -> int:
    size = 4 * sum(p.numel() for p in trainer.model.parameters())
    return min(MOST, max(FEWEST, CACHE // size))


def _examples(work: Work) -> tuple[Tensor, Tensor]:
    """All that its client holds: (n, features), (n,)."""
    batches = work.trainer.batches
    assert isinstance(batches, TensorBatches)
    return batches.x.flatten(1), batches.y


def _starts_flat(model: nn.Sequential) -> bool:
    return any(type(module) is nn.Flatten for module in model)


class _Stack:
    """K clients, the one with the most steps first, so that those still training are a prefix."""

    def __init__(self, works: Sequence[Work]) -> None:
        first = works[0].trainer
        layers = chain(first.model)
        assert layers is not None
        self._works, self._layers, self._config = works, layers, first.config
        self._mu, self._rows = _mu(works[0]), first.batch
        names = [name for name, _ in first.model.named_parameters()]
        self._params = {n: torch.stack([work.start[n] for work in works]) for n in names}
        self._anchor = {n: p.clone() for n, p in self._params.items()} if self._mu else {}
        self._kept: dict[str, tuple[Tensor, ...]] = {}  # the optimizer's state
        self._examples = [_examples(work) for work in works]
        self._rows_of = [w.trainer.batches.order.run(w.task.done, w.task.steps) for w in works]

    @torch.no_grad()
    def trained(self) -> list[Trained | None]:
        """All their steps."""
        counts = [work.task.steps for work in self._works]
        most, many = counts[0], len(counts)
        labels, x = self._labels(), self._buffer()
        picked = torch.zeros(most, many, self._rows)  # log-probabilities of the right class
        n = many
        for step in range(most):
            while counts[n - 1] <= step:
                n -= 1
            at = step % x.shape[1]
            if at == 0:
                self._fill(x, step, n)
            gradients = self._gradients(x[:n, at], labels[step, :n], picked[step, :n])
            for name, gradient in gradients.items():
                self._update(name, gradient, n, step)
        totals = torch.zeros(many)
        for step, losses in enumerate(_losses(picked)):
            n = sum(count > step for count in counts)
            totals[:n] += losses[:n]
        return [self._result(k, total) for k, total in enumerate(totals.tolist())]

    def _result(self, k: int, total: float) -> Trained | None:
        steps = self._works[k].task.steps
        if total != total or total in (float("inf"), float("-inf")):
            return None
        tensors = {name: stacked[k] for name, stacked in self._params.items()}
        metrics = {"loss": total / steps} if steps else {}
        return Trained(tensors, steps, steps * self._rows, metrics)

    def _labels(self) -> Tensor:
        """(steps, K, B, 1), zero where a client has no such step."""
        found = torch.zeros(
            len(self._rows_of[0]), len(self._works), self._rows, 1, dtype=torch.int64
        )
        for k, rows in enumerate(self._rows_of):
            found[: len(rows), k, :, 0] = self._examples[k][1][rows]
        return found

    def _buffer(self) -> Tensor:
        """(K, a few steps, B, D): room for the examples of the next steps."""
        width, many = self._params[self._layers[0].weight].shape[2], len(self._works)
        few = max(1, CACHE // (4 * many * self._rows * width))
        return torch.empty(many, min(few, max(1, len(self._rows_of[0]))), self._rows, width)

    def _fill(self, x: Tensor, step: int, n: int) -> None:
        """The first n clients' examples, of as many steps from `step` on as there is room for."""
        few = x.shape[1]
        for k in range(n):
            rows = self._rows_of[k][step : step + few].reshape(-1)
            out = x[k].view(-1, x.shape[3])[: len(rows)]
            torch.index_select(self._examples[k][0], 0, rows, out=out)

    # ---- one step ----------------------------------------------------------------------------

    def _gradients(self, x: Tensor, y: Tensor, picked: Tensor) -> dict[str, Tensor]:
        """Of each client's mean loss on its batch: x (n, B, D), y (n, B, 1); fills picked (n, B).

        The kernels are those that autograd calls, so that the bits are, too.
        """
        n, inputs = len(x), [x]
        for layer in self._layers:
            z = self._linear(layer, inputs[-1], n)
            inputs.append(z.relu_() if layer.relu else z)
        log_p = torch.log_softmax(inputs.pop(), 2)
        picked.copy_(log_p.gather(2, y).squeeze(2))
        g = torch.zeros_like(log_p).scatter_(2, y, -1.0 / self._rows)
        g = torch.ops.aten._log_softmax_backward_data(g, log_p, 2, torch.float32)
        found: dict[str, Tensor] = {}
        for at in range(len(self._layers) - 1, -1, -1):
            layer, a = self._layers[at], inputs[at]
            found[layer.weight] = torch.bmm(g.mT, a)
            if layer.bias is not None:
                found[layer.bias] = g.sum(1)
            if at:
                g = torch.bmm(g, self._params[layer.weight][:n])
                if self._layers[at - 1].relu:
                    g = torch.ops.aten.threshold_backward(g, a, 0)
        return found

    def _linear(self, layer: Layer, a: Tensor, n: int) -> Tensor:
        weight = self._params[layer.weight][:n].mT
        if layer.bias is None:
            return torch.bmm(a, weight)
        return torch.baddbmm(self._params[layer.bias][:n].unsqueeze(1), a, weight)

    def _update(self, name: str, g: Tensor, n: int, step: int) -> None:
        """One step of the first n clients' optimizers, as `client/sgd.py` and torch's Adam do."""
        config, p = self._config, self._params[name][:n]
        if self._mu:
            g.add_(p - self._anchor[name][:n], alpha=self._mu)
        if config.optimizer == "adam":
            self._adam(name, p, g, step)
            return
        if config.weight_decay:
            g = g.add(p, alpha=config.weight_decay)
        if config.momentum:
            if step == 0:
                self._kept[name] = (g.clone(),)
            else:
                self._kept[name][0][:n].mul_(config.momentum).add_(g)
            g = self._kept[name][0][:n]
        p.add_(g, alpha=-config.lr)

    def _adam(self, name: str, p: Tensor, g: Tensor, step: int) -> None:
        from torch.optim.adam import adam  # its import takes a second

        kept = self._kept.setdefault(name, (torch.zeros_like(p), torch.zeros_like(p)))
        first, second = (tensor[: len(p)] for tensor in kept)
        adam(
            [p], [g], [first], [second], [], [torch.tensor(float(step))], foreach=False,
            amsgrad=False, beta1=0.9, beta2=0.999, lr=self._config.lr,
            weight_decay=self._config.weight_decay, eps=1e-8, maximize=False,
        )  # fmt: skip


def _losses(picked: Tensor) -> Tensor:
    """Mean losses (steps, K) of log-probabilities (steps, K, B), summed in torch's own order.

    `nll_loss` puts the first row aside, adds up the others in runs of 16, then what is left of
    them, the runs and the first, in this order.
    """
    rows = picked.unbind(2)
    level = torch.zeros_like(rows[0])
    runs = torch.zeros_like(level)
    for at, row in enumerate(rows[1:], 1):
        level = level - row
        if at % 16 == 0:
            runs, level = runs + level, torch.zeros_like(level)
    return ((level + runs) - rows[0]) / len(rows)
