"""Stacked: the local training of many clients at once, as batched matrix products.

For chains of Flatten, Linear and ReLU under cross-entropy, by plain SGD or Adam, FedProx too: what
simulations of many small clients train. With one thread of torch the numbers are those of one
client at a time, bit for bit: only layers whose batched products run the same kernel on each of
their matrices are stacked (`client/stacked_products.py` tries them), and everything else treats
each number or each row alone. (With several threads torch cuts a single large product, but not one
of a batch, into pieces, and the last bits differ: by less than 1e-6 of a weight and step.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from atoll.client.algorithm import FedProx, Plain
from atoll.client.batches import TensorBatches
from atoll.client.local import LocalConfig, TorchTrainer
from atoll.client.stacked_batches import StackedBatches
from atoll.client.stacked_loss import MOST_ROWS, StackedLoss
from atoll.client.stacked_products import same_bits
from atoll.client.trainer import Task, Tensors, Trained

CACHE = 4 << 20  # bytes of models, gradients and batches of those that are trained at a time
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
            same_bits(batches.order.batch, p.shape[1], p.shape[0])
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
    params = [p.numel() for p in trainer.model.parameters()]
    size = 4 * (2 * sum(params) + trainer.batch * _width(trainer))
    return min(MOST, max(FEWEST, CACHE // size))


def _width(trainer: TorchTrainer) -> int:
    """Numbers in an example."""
    return next(p.shape[1] for p in trainer.model.parameters() if p.dim() == 2)


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
        weights = [self._params[layer.weight] for layer in layers]
        many, rows = len(works), first.batch
        self._outputs = [torch.empty(many, rows, w.shape[1]) for w in weights]  # of each layer
        self._passed = [torch.empty_like(out) for out in self._outputs[:-1]]  # gradients there
        self._gradients = [torch.empty_like(w) for w in weights]
        found = [work.trainer.batches for work in works]
        sources = [batches for batches in found if isinstance(batches, TensorBatches)]  # all
        self._batches = StackedBatches(sources, [work.task for work in works])

    @torch.no_grad()
    def trained(self) -> list[Trained | None]:
        """All their steps."""
        counts = [work.task.steps for work in self._works]
        totals, step = torch.zeros(len(counts)), 0
        for x, labels in self._batches.pieces():
            loss = StackedLoss(labels, self._outputs[-1].shape[2])
            training = [sum(c > step + at for c in counts) for at in range(len(labels))]
            for at, n in enumerate(training):
                inputs, logits = self._forward(x[:n, at])
                self._backward(inputs, loss.gradient(at, logits), step + at)
            for n, losses in zip(training, loss.means(), strict=True):
                totals[:n] += losses[:n]
            step += len(labels)
        return [self._result(k, total) for k, total in enumerate(totals.tolist())]

    def _result(self, k: int, total: float) -> Trained | None:
        steps = self._works[k].task.steps
        if total != total or total in (float("inf"), float("-inf")):
            return None
        tensors = {name: stacked[k] for name, stacked in self._params.items()}
        metrics = {"loss": total / steps} if steps else {}
        return Trained(tensors, steps, steps * self._rows, metrics)

    # ---- one step ----------------------------------------------------------------------------
    # The kernels are those that autograd calls, so that the bits are, too.

    def _forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """What goes into each layer, the first n clients' x (n, B, D), and the logits."""
        n, inputs = x.shape[0], [x]
        for layer, room in zip(self._layers, self._outputs, strict=True):
            z, weight = room[:n], self._params[layer.weight][:n].mT
            if layer.bias is None:
                torch.bmm(inputs[-1], weight, out=z)
            else:
                bias = self._params[layer.bias][:n].unsqueeze(1)
                torch.baddbmm(bias, inputs[-1], weight, out=z)
            inputs.append(z.relu_() if layer.relu else z)
        return inputs, inputs.pop()

    def _backward(self, inputs: list[Tensor], g: Tensor, step: int) -> None:
        """Gradients from that of the logits (n, B, classes), and the optimizers' step by them."""
        n = g.shape[0]
        for at in range(len(self._layers) - 1, -1, -1):
            layer, a, here = self._layers[at], inputs[at], g
            weight = torch.bmm(here.mT, a, out=self._gradients[at][:n])
            if at:
                g = torch.bmm(here, self._params[layer.weight][:n], out=self._passed[at - 1][:n])
                if self._layers[at - 1].relu:
                    torch.ops.aten.threshold_backward.grad_input(g, a, 0, grad_input=g)
            self._update(layer.weight, weight, step)
            if layer.bias is not None:
                self._update(layer.bias, here.sum(1), step)

    def _update(self, name: str, g: Tensor, step: int) -> None:
        """One step of the first n clients' optimizers, as `client/sgd.py` and torch's Adam do."""
        n = g.shape[0]
        config, p = self._config, self._params[name][:n]
        if self._mu:
            g.add_(p - self._anchor[name][:n], alpha=self._mu)
        if config.optimizer == "adam":
            self._adam(name, p, g, step)
            return
        if config.weight_decay:
            g.add_(p, alpha=config.weight_decay)
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
