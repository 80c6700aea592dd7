"""Work: a peer's training half. AdamW in a thread of its own, from the anchor of its sync engine.

    work = Work(manifest, folder, shard=peer_id)
    done = await work.train(50, progress)         # work.engine's anchor is where it starts
    ...                                           # done.delta, and its weight times done.factor
    work.engine.commit(mean)

Batches are a pure function of (seed, peer, step of the run), and the schedule of the step of the
run, round * H + h: who comes late starts where the run is. AdamW's moments are the peer's own; they
live through all rounds, are never averaged, and lie in `folder` for the next process.
"""

import asyncio
import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from atoll.aggregation.outer import outer
from atoll.aggregation.sync_engine import SyncEngine
from atoll.client import inner
from atoll.client.batches import mixed
from atoll.client.bench import bench
from atoll.client.data import load_data
from atoll.client.local import LocalConfig, TorchTrainer
from atoll.client.models import build, manifest_of
from atoll.client.specs import trainer_on
from atoll.client.trainer import Task
from atoll.p2p.memory import on_disk
from atoll.protocols.codecs import as_bytes
from atoll.protocols.errors import ClientError, UsageError
from atoll.protocols.events import Then
from atoll.protocols.manifest import Manifest
from atoll.protocols.tensors import flatten, unflatten

Progress = Callable[[int], None]  # steps done; called in the training thread
T = TypeVar("T")

WARM = 100  # steps, at most, over which a fresh AdamW comes to its step size
WEIGHT_DECAY, CLIP = 0.1, 1.0  # DiLoCo's inner AdamW


class Recipe(Protocol):
    """What all peers of a run share of their training: a run's manifest, or one like it."""

    @property
    def model(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def local_steps(self) -> int: ...  # H
    @property
    def batch(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def outer(self) -> str: ...
    @property
    def rounds(self) -> int: ...  # 0: no end, and no cosine towards it


@dataclass(frozen=True)
class Facts:
    """Of a model, as a run's manifest has them."""

    elements: int  # of its vector
    schema: str  # hash of names, shapes and dtypes, and of the values that never change
    init: str  # SHA-256, in hex, of the vector it starts from


@dataclass(frozen=True, eq=False)
class Trained:
    delta: Tensor  # anchor - trained, flat fp32; zeros where `factor` is 0
    factor: float  # of its weight: 0.0 where the work must not count, else 1.0
    steps: int
    tokens: int  # seen: characters of text, else examples
    loss: float  # mean over the steps; NaN where there is none
    seconds: float


class Work:
    """Constructor, `evaluate`, `sample` and `bench` block, and belong in a thread; `train` is for
    the loop. One of them runs at a time. `close` at the end."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path | None,
        *,
        shard: str | int,
        device: str = "cpu",
        speed_factor: float = 1.0,
    ) -> None:
        """`shard`: who this is, for the order of its data. `folder` None: nothing is kept on disk.
        `speed_factor` under 1 plays a slower machine. UsageError, DataError as their parts raise.
        """
        data = load_data(recipe.data)
        self.recipe, self._data, self._folder = recipe, data, folder
        self._trainer: TorchTrainer = trainer_on(
            data.train, data, recipe.model, recipe.seed, local_of(recipe, device),
            client=f"peer {shard}",
        )  # fmt: skip
        self.manifest = vector_only(self._trainer.manifest)
        vector = flatten(self.manifest, self._trainer.export(), "trainable")
        self.facts = facts_of(self.manifest, _detached(self._trainer.model))
        self.engine = SyncEngine(outer(recipe.outer), vector)
        self.speed = 0.0  # local steps a second, a running mean over orders; 0: none yet
        self._factor = speed_factor
        self._stop = threading.Event()
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="work")
        self._remember()

    async def train(self, steps: int, progress: Progress | None = None) -> Trained:
        """`steps` local steps from the engine's anchor. Cancelled, it ends after the step it is in,
        and AdamW has seen what was trained."""
        self._stop.clear()
        working = asyncio.wrap_future(self._thread.submit(self._train, steps, progress))
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            self._stop.set()
            with contextlib.suppress(Exception):
                await working
            raise

    def evaluate(self) -> float:
        """Loss of the anchor on held-out data."""
        return self._in_thread(self._evaluate)

    def sample(self, n: int = 200, seed: int = 0) -> str:
        """`n` characters as the anchor writes them; empty where the data are no text."""
        return self._in_thread(lambda: self._sample(n, seed))

    def bench(self, seconds: float = 1.0) -> float:
        """Local steps a second, measured; nothing is trained by it."""
        found = self._in_thread(lambda: bench(self._trainer, seconds))
        return self._factor / found.seconds_per_step

    def close(self) -> None:
        """Stop what is in training after its step. What is asked later runs in its caller."""
        self._closed = True
        self._stop.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    # ---- in the training thread ----------------------------------------------------------------

    def _in_thread(self, call: Callable[[], T]) -> T:
        return call() if self._closed else self._thread.submit(call).result()

    def _load(self, vector: Tensor) -> None:
        self._trainer.load(unflatten(self.manifest, "trainable", vector))

    def _train(self, steps: int, progress: Progress | None) -> Trained:
        state, began = self.engine.state, time.monotonic()
        self._load(state.anchor)
        task = Task(
            steps,
            done=state.round * self.recipe.local_steps,
            asked=self._asked,
            report=self._reporter(progress),
        )
        try:
            made = self._trainer.train(task)
        except ClientError as error:
            if error.code != "FL-C104":  # the loss is no longer a number
                raise
            self._forget_if_spoiled()
            return Trained(torch.zeros_like(state.anchor), 0.0, 0, 0, float("nan"), 0.0)
        local = flatten(self.manifest, made.tensors, "trainable")
        delta, factor = self.engine.contribution(local)
        if not factor:
            self._forget_if_spoiled()
        self._keep()
        seconds = time.monotonic() - began
        self._reckon(made.steps / seconds if seconds else 0.0)
        tokens = made.examples * (self._data.info.shape[0] if self._is_text else 1)
        loss = made.metrics.get("loss", float("nan"))
        return Trained(delta, factor, made.steps, tokens, loss, seconds)

    def _asked(self) -> Then | None:
        return "send" if self._stop.is_set() else None

    def _reporter(self, progress: Progress | None) -> Progress:
        last = time.monotonic()

        def report(step: int) -> None:
            nonlocal last
            if self._factor < 1:
                self._stop.wait((time.monotonic() - last) * (1 / self._factor - 1))
                last = time.monotonic()
            if progress is not None:
                progress(step)

        return report

    def _reckon(self, speed: float) -> None:
        self.speed = speed if not self.speed else self.speed + 0.3 * (speed - self.speed)

    def _evaluate(self) -> float:
        self._load(self.engine.state.anchor)
        return self._trainer.evaluate()["loss"]

    @property
    def _is_text(self) -> bool:
        return self._data.info.kind == "text"

    def _sample(self, n: int, seed: int) -> str:
        if not self._is_text:
            return ""
        info, model = self._data.info, self._trainer.model
        self._load(self.engine.state.anchor)
        generator = torch.Generator().manual_seed(mixed(seed, "sample"))
        tokens = torch.zeros(1, 1, dtype=torch.int64)
        model.eval()
        with torch.inference_mode():
            for _ in range(n):
                logits = model(tokens[:, -info.shape[0] :].to(self._trainer.device))[0, -1]
                chances = torch.softmax(logits.float().cpu() / 0.8, 0)
                drawn = torch.multinomial(chances, 1, generator=generator)
                tokens = torch.cat((tokens, drawn[None]), 1)
        model.train()
        return "".join(info.vocabulary[i] for i in tokens[0, 1:].tolist())

    # ---- AdamW's moments -----------------------------------------------------------------------

    def _forget_if_spoiled(self) -> None:
        """Moments that are not finite would spoil every round to come."""
        state = self._trainer.optimizer_state()
        if not all(bool(torch.isfinite(value).all()) for value in state.values()):
            self._trainer.load_optimizer_state({})
            self._keep()

    def _keep(self) -> None:
        if self._folder is not None:
            with on_disk(self._folder / inner.FILE):
                inner.write(self._trainer, self._folder)

    def _remember(self) -> None:
        if self._folder is not None:
            inner.read(self._trainer, self._folder)


def facts(model: str, data: str, seed: int) -> Facts:
    """Of the model that a run with these would have. Blocks."""
    module = build(model, load_data(data).info, seed)
    manifest = vector_only(manifest_of(module))
    return facts_of(manifest, _detached(module))


def facts_of(manifest: Manifest, tensors: Mapping[str, Tensor]) -> Facts:
    """Of a model with these values, before any training."""
    vector, schema = flatten(manifest, tensors, "trainable"), manifest.schema
    if manifest.counts["frozen"]:  # they do not travel, so all must have the same
        never = as_bytes(flatten(manifest, tensors, "frozen"))
        schema = hashlib.sha256(schema.encode() + bytes(never)).hexdigest()
    return Facts(vector.numel(), schema, hashlib.sha256(as_bytes(vector)).hexdigest())


def _detached(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def vector_only(manifest: Manifest) -> Manifest:
    """UsageError FL-S104 where a model has more than its vector that changes in training."""
    if manifest.counts["buffers_float"] or manifest.counts["buffers_other"]:
        raise UsageError(
            "FL-S104",
            "the model has buffers (BatchNorm's statistics, say), which peers do not average",
            "take one without, e.g. with LayerNorm or GroupNorm",
        )
    return manifest


def local_of(recipe: Recipe, device: str = "cpu") -> LocalConfig:
    """How a peer trains: AdamW that is kept, and a cosine to a tenth where the run has an end."""
    end = recipe.rounds * recipe.local_steps
    return LocalConfig(
        lr=recipe.lr,
        batch=recipe.batch,
        optimizer="adamw",
        weight_decay=WEIGHT_DECAY,
        clip=CLIP,
        keep_optimizer_state=True,
        schedule=f"cosine:steps={end},warm=0" if end else "constant",
        warm=min(WARM, recipe.local_steps),
        device=device,
    )
