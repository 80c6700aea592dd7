"""The reference training loop on torch: exactly N local steps, batches a pure function of the step.

The loop's parts are one method each, so that a local algorithm can stand between them: batch,
gradients, `transform_grad`, clipping, optimizer step, `after_step`.
"""

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from atoll.client.adam import Adam
from atoll.client.algorithm import FedProx, LocalAlgorithm, Plain
from atoll.client.batches import Batch, batches, in_order, mixed
from atoll.client.data import Examples, Kind, size
from atoll.client.flat import FlatModel
from atoll.client.heldout import FEWEST, HeldOut, Validator
from atoll.client.keep import Rule
from atoll.client.models import manifest_of, named_tensors, seed_torch
from atoll.client.objective import loss_of, score
from atoll.client.schedule import schedule
from atoll.client.sgd import SGD
from atoll.client.trainer import Task, Tensors, Trained
from atoll.protocols.errors import ClientError, UsageError
from atoll.protocols.manifest import TRAVELLING

Optimizer = SGD | Adam
OPTIMIZERS = ("sgd", "adam", "adamw")
AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
EVAL_BATCH = 1024
LOOK_EVERY = 32  # steps between looks at the loss on an accelerator: each look waits for it


@dataclass(frozen=True, slots=True)
class LocalConfig:
    """How a client trains. Raises UsageError FL-S102 for a value that cannot be."""

    lr: float = 0.1
    batch: int = 32
    optimizer: str = "sgd"  # "sgd", "adam", "adamw"
    momentum: float = 0.0  # of sgd
    weight_decay: float = 0.0
    schedule: str = "constant"  # of lr, over the run's steps: see `client/schedule.py`
    warm: int = 0  # own steps over which a fresh adam or adamw rises to lr
    clip: float | None = None  # largest norm of the whole gradient; None: as it is
    autocast: str = "none"  # "none", "bf16", "fp16" (with loss scaling)
    prox: float = 0.0  # FedProx's mu; the same as local algorithm fedprox:mu=...
    keep_optimizer_state: bool = False  # False: fresh for each order; True: DiLoCo's inner AdamW
    device: str = "auto"  # "auto": cuda, mps or cpu, the first there is
    workers: int = 0  # processes that read a user's Dataset ahead

    def __post_init__(self) -> None:
        wrong = [
            ("lr", not (math.isfinite(self.lr) and self.lr > 0), "a number above 0"),
            ("batch", self.batch < 1, "at least 1"),
            ("optimizer", self.optimizer not in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            ("momentum", not 0 <= self.momentum < 1, "from 0 to under 1"),
            ("weight_decay", not 0 <= self.weight_decay < math.inf, "at least 0"),
            ("clip", self.clip is not None and not 0 < self.clip < math.inf, "a number above 0"),
            ("autocast", self.autocast not in AUTOCAST, f"one of {', '.join(AUTOCAST)}"),
            ("prox", not 0 <= self.prox < math.inf, "at least 0"),
            ("workers", self.workers < 0, "at least 0"),
            ("warm", self.warm < 0, "at least 0"),
        ]
        for name, bad, want in wrong:
            if bad:
                raise UsageError("FL-S102", f"{name}={getattr(self, name)!r}", f"give {want}")


class TorchTrainer:
    """A `Trainer` for any nn.Module. Model, examples and optimizer stay on the device.

    `slowdown` seconds are slept after each step, through `sleep`, so that one machine can play
    clients of several speeds. `held` are examples apart from these, by which it judges the models
    of a merge where a run asks for that; None: it does not.
    """

    reads_only = True  # `load` copies

    def __init__(
        self,
        model: nn.Module,
        examples: Examples,
        test: Examples | None = None,
        config: LocalConfig = LocalConfig(),
        *,
        kind: Kind = "classification",
        algorithm: LocalAlgorithm | None = None,
        client: str = "client",
        seed: int = 0,
        slowdown: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
        held: Examples | None = None,
    ) -> None:
        if algorithm is not None and config.prox:
            raise UsageError("FL-S104", "both prox and a local algorithm are given", "drop one")
        self.config = config
        self.device = device_of(config.device)
        self.model = model.to(self.device)
        self.manifest = manifest_of(model)
        self.examples = size(examples)
        self.algorithm = algorithm or (FedProx(config.prox) if config.prox else Plain())
        self._factor = schedule(config.schedule)
        if self.algorithm.rules and config.schedule != "constant":
            raise UsageError(
                "FL-S104",
                f"schedule={config.schedule!r} with {type(self.algorithm).__name__}",
                "it reckons with one lr: leave the schedule out",
            )
        self.kind = kind
        self._test, self._held = test, held
        self.batches = batches(examples, config.batch, seed, client, self.device, config.workers)
        self._random = (seed, client)
        self.slowdown, self._sleep = slowdown, sleep
        self._params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        steered = replace(config, weight_decay=0.0) if self.algorithm.steers else config
        self._optimizer = _optimizer(steered, self._params)
        self._scaler = self._new_scaler()

    @property
    def rules(self) -> Mapping[str, Rule]:
        """Of the algorithm's private state."""
        return self.algorithm.rules

    @functools.cached_property
    def validator(self) -> Validator | None:
        """On a copy of the model, on the CPU: it is asked while this one trains."""
        if self._held is None:
            return None
        few = size(self._held) < FEWEST
        copied = None if few else FlatModel(copy.deepcopy(self.model), self._held, self.kind)
        return HeldOut(copied, self._held)

    @property
    def batch(self) -> int:
        """Examples a step sees: the batch, or all of them where the client has fewer."""
        return self.batches.order.batch

    def load(self, tensors: Tensors) -> None:
        """Copy `tensors`, all that travel and nothing else; ValueError names the one at fault.

        Nothing is changed where anything does not fit.
        """
        own = self._travelling()
        for name in tensors:
            if name not in own:
                raise ValueError(f"tensor {name!r} is not in the model")
        for name, mine in own.items():
            if name not in tensors:
                raise ValueError(f"tensor {name!r} {tuple(mine.shape)} is missing")
            if tensors[name].shape != mine.shape:
                raise ValueError(
                    f"tensor {name!r} is {tuple(tensors[name].shape)}, "
                    f"the model has {tuple(mine.shape)}"
                )
            if tensors[name].is_floating_point() != mine.is_floating_point():
                raise ValueError(f"tensor {name!r} is {tensors[name].dtype}, not {mine.dtype}")
        with torch.no_grad():
            for name, mine in own.items():
                mine.copy_(tensors[name])

    def export(self) -> Tensors:
        """The model's travelling tensors, detached, on the CPU; there they alias the model."""
        return {name: tensor.detach().cpu() for name, tensor in self._travelling().items()}

    def train(self, task: Task) -> Trained:
        """Run `task.steps` local steps, fewer where `task.asked` says to stop.

        Raises ClientError FL-C104 where the loss is no longer a number.
        """
        self.model.train()
        if not self.config.keep_optimizer_state:
            self._optimizer.state.clear()
            self._scaler = self._new_scaler()
        self.algorithm.before_order(self._params, task)
        with self._seeded(task.done):
            return self._run(task)

    def evaluate(self) -> Mapping[str, float]:
        """Loss and examples of the test split; accuracy of classes, perplexity of text."""
        if self._test is None:
            return {"examples": 0.0}
        self.model.eval()
        with torch.inference_mode(), self._cast():
            found = score(self.model, in_order(self._test, EVAL_BATCH, self.device), self.kind)
        self.model.train()
        return found

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors as `parameter/name`, copied: what a keeping client stores."""
        return {
            f"{name}/{key}": torch.as_tensor(value).detach().clone()
            for name, p in self._params.items()
            for key, value in self._optimizer.state.get(p, {}).items()
            if value is not None
        }

    def load_optimizer_state(self, state: Tensors) -> None:
        """Take what `optimizer_state` gave; ValueError names a parameter that is not there."""
        self._optimizer.state.clear()
        for path, value in state.items():
            name, _, key = path.rpartition("/")
            if name not in self._params:
                raise ValueError(f"optimizer state {path!r} is of no parameter of the model")
            if key != "step" and value.shape != self._params[name].shape:
                raise ValueError(f"optimizer state {path!r} is {tuple(value.shape)}")
            at = self._params[name].device if key != "step" else value.device
            kept = self._optimizer.state.setdefault(self._params[name], {})
            kept[key] = value.clone().to(at)

    # ---- the loop --------------------------------------------------------------------------

    def _run(self, task: Task) -> Trained:
        total, steps = torch.zeros((), device=self.device), 0
        every = 1 if self.device.type == "cpu" else LOOK_EVERY
        first = int(task.extra.get("run_step", task.done))
        for batch in self.batches.stream(task.done, task.steps):
            self._optimizer.lr = self.config.lr * self._factor(first + steps)
            total += self._step(batch)
            steps += 1
            if steps % every == 0 or steps == task.steps:
                self._still_a_number(total, steps, task)
            task.report(steps)
            if self.slowdown:
                self._sleep(self.slowdown)
            then = task.asked()
            if then == "continue":
                task.snapshot(self._trained(steps, total, task))
            elif then is not None:
                break
        return self._trained(steps, total, task)

    def _step(self, batch: Batch) -> Tensor:
        """One local step; the loss before it, on the device."""
        random = self._random_state() if self.algorithm.reevaluates else None
        loss = self._gradients(batch, self._scaler, self.algorithm.view_weights(self._params))
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)  # type: ignore[arg-type]  # it is like torch's
        if self.algorithm.steers:
            self._decay_and_clip()
        self.algorithm.transform_grad(self._params, functools.partial(self._again, batch, random))
        if self.config.clip is not None and not self.algorithm.steers:
            nn.utils.clip_grad_norm_(self._params.values(), self.config.clip)
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)  # type: ignore[arg-type]
            self._scaler.update()
        self.algorithm.after_step(self._params)
        return loss

    def _gradients(
        self,
        batch: Batch,
        scaler: "torch.amp.GradScaler | None" = None,
        at: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The loss at the parameters, or at the values `at` in their place; its gradients lie in
        `p.grad`."""
        for p in self._params.values():
            p.grad = None  # as zero_grad does, without its profiler's hooks: 8 % of a small step
        with self._standing_at(at):
            with self._cast():
                loss = loss_of(self.model, batch, self.kind)
            torch.autograd.backward(loss if scaler is None else scaler.scale(loss))
        return loss.detach()

    @contextmanager
    def _standing_at(self, values: Sequence[Tensor] | None) -> Iterator[None]:
        """The parameters hold `values` meanwhile."""
        if values is None:
            yield
            return
        own = [p.data for p in self._params.values()]
        try:
            for p, value in zip(self._params.values(), values, strict=True):
                p.data = value
            yield
        finally:
            for p, mine in zip(self._params.values(), own, strict=True):
                p.data = mine

    def _decay_and_clip(self) -> None:
        """What makes the gradient of a batch that of the client's objective, and bounds it."""
        if self.config.weight_decay:
            with torch.no_grad():
                for p in self._params.values():
                    if p.grad is not None:
                        p.grad.add_(p, alpha=self.config.weight_decay)
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self._params.values(), self.config.clip)

    def _again(
        self,
        batch: Batch,
        random: "tuple[Tensor, Tensor | None] | None",
        at: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """See `algorithm.Again`."""
        if random is None:
            return self._gradients(batch, at=at)
        buffers = [b for b in self.model.buffers() if b is not None]
        kept = [b.clone() for b in buffers]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(random[0])
            if random[1] is not None:
                torch.cuda.set_rng_state(random[1], self.device)
            loss = self._gradients(batch, at=at)
        with torch.no_grad():
            for buffer, was in zip(buffers, kept, strict=True):
                buffer.copy_(was)
            if at is not None and self.algorithm.steers:
                with self._standing_at(at):
                    self._decay_and_clip()
        return loss

    def _random_state(self) -> tuple[Tensor, Tensor | None]:
        on_device = self.device.type == "cuda"
        return torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if on_device else None

    def _still_a_number(self, total: Tensor, steps: int, task: Task) -> None:
        if not math.isfinite(total.item()):
            raise ClientError(
                "FL-C104",
                f"loss is no longer a number at step {steps} of {task.steps} "
                f"(local step {task.done + steps})",
                f"lower lr={self.config.lr}, or set clip; check the data for NaN",
            )

    def _trained(self, steps: int, total: Tensor, task: Task) -> Trained:
        metrics = {"loss": total.item() / steps} if steps else {}
        found = self.algorithm.measure(self._params, task, steps, self.config.lr)
        return Trained(
            self.export(), steps, steps * self.batch, {**metrics, **found.metrics},
            found.state, found.extras, found.said,
        )  # fmt: skip

    def _new_scaler(self) -> "torch.amp.GradScaler | None":
        return torch.amp.GradScaler(self.device.type) if self.config.autocast == "fp16" else None

    def _travelling(self) -> dict[str, Tensor]:
        groups = {spec.name: spec.group for spec in self.manifest.tensors}
        return {n: t for n, t in named_tensors(self.model) if groups[n] in TRAVELLING}

    def _cast(self) -> AbstractContextManager[object]:
        dtype = AUTOCAST[self.config.autocast]
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()

    @contextmanager
    def _seeded(self, done: int) -> Iterator[None]:
        """Dropout and the like draw from (seed, client, step), and the caller's state stays."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            seed_torch(mixed(*self._random, "order", done))
            yield


def device_of(name: str) -> torch.device:
    """`auto` is cuda, mps or cpu, the first there is. UsageError FL-S102 for one that is not."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError("FL-S102", f"device {name!r}: {error}", "use auto, or cpu") from error


def _optimizer(config: LocalConfig, params: Mapping[str, nn.Parameter]) -> Optimizer:
    if not params:
        raise UsageError("FL-S102", "the model has nothing to train", "unfreeze a parameter")
    values, decay = list(params.values()), config.weight_decay
    if config.optimizer == "sgd":
        return SGD(values, config.lr, config.momentum, decay)
    decoupled = config.optimizer == "adamw"
    return Adam(values, config.lr, decay, decoupled, config.warm)
