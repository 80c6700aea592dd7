"""Error feedback in a client: what was used and what is kept add up to all that was learned."""

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atoll.client.keep import Keep
from atoll.client.outbox import Outbox
from atoll.client.residual import KIND
from atoll.client.trainer import Task, Trained
from atoll.client.work import Workbench
from atoll.protocols import tensors
from atoll.protocols.blobs import INLINE, BlobInfo
from atoll.protocols.codec_powersgd import PowerSGD
from atoll.protocols.codecs import Codec
from atoll.protocols.codecspec import parse
from atoll.protocols.events import Then
from atoll.protocols.feedback import RESIDUAL
from atoll.protocols.manifest import Manifest, TensorSpec
from atoll.protocols.messages import Order, Result
from atoll.protocols.payload import Payload

COUNT = 5000
MANIFEST = Manifest(
    (
        TensorSpec("w", (50, 100), "float32", "trainable"),
        TensorSpec("mean", (3,), "float32", "buffers_float"),
    )
)
SPECS = ["bf16+ef", "fp16+ef", "int8+ef", "topk:0.01+ef", "topk:0.01+ef+zstd"]


class Killed(BaseException):
    """The process is gone at this point."""


class Fragile(Outbox):
    """May be killed before a result is listed, or before one is dropped."""

    mortal = ""

    def put(self, result: Result, view: memoryview) -> None:
        if self.mortal == "put":
            raise Killed
        super().put(result, view)

    def drop(self, update: str) -> None:
        if self.mortal == "drop":
            raise Killed
        super().drop(update)


class Drift:
    """Every order moves the model by a random delta of its own, the same if trained again."""

    def __init__(self) -> None:
        self.loaded: Mapping[str, Tensor] = {}
        self.seed = 0

    def load(self, values: Mapping[str, Tensor]) -> None:
        self.loaded = {n: v.clone() for n, v in values.items()}

    def delta(self) -> Tensor:
        noise = torch.Generator().manual_seed(self.seed)
        return torch.randn(COUNT, generator=noise)

    def train(self, task: Task) -> Trained:
        local = {"w": self.loaded["w"] - self.delta().view(50, 100), "mean": torch.full((3,), 7.0)}
        if task.asked() == "continue":
            task.snapshot(Trained(local, 1, 1, {}))
        return Trained(local, 1, 1, {})

    def evaluate(self) -> Mapping[str, float]:
        return {}


class Life:
    """One life of a client's process after the other, on the same disk."""

    def __init__(self, folder: Path, spec: str) -> None:
        self.folder, self.chain = folder, parse(spec)
        self.codec: Codec = tensors.codec_for(MANIFEST, self.chain)
        self.learned = torch.zeros(COUNT, dtype=torch.float64)
        self.used = torch.zeros(COUNT, dtype=torch.float64)
        self.orders = 0
        self.start()

    def start(self) -> None:
        self.outbox = Fragile(self.folder)
        self.keep = Keep(self.folder / "keep")
        self.keep.retain([update for _, update in self.outbox.waiting()])
        self.outbox.enter("run")
        self.keep.enter("run")
        self.trainer = Drift()
        self.bench = Workbench(
            self.trainer, MANIFEST, self.codec, tensors.codec_for(MANIFEST, "fp32"),
            self.outbox, self.keep,
        )  # fmt: skip
        self.bench.agree(self.codec, tensors.codec_for(MANIFEST, "fp32"), self.chain.feedback)

    def kill(self) -> None:
        self.keep.close()
        self.outbox.close()
        self.start()

    def do(self, asked: Then | None = None) -> str:
        """The next order, until it is done, however often its process dies."""
        self.orders += 1
        self.trainer.seed = self.orders
        sections = tensors.sections_of(MANIFEST, tensors.codec_for(MANIFEST, "fp32"))
        data = bytes(4 * (COUNT + 3))
        order = Order(f"o{self.orders}", 0, 0, 1, BlobInfo("v", len(data), b"", sections), data)
        done = self.bench.do(order, no_fetch, lambda: asked, lambda step: None, lambda result: None)
        assert done.final
        self.learned += self.trainer.delta().double()
        return done.update

    def settle(self, update: str, fate: str) -> None:
        kept = self.outbox.get(update)
        assert kept is not None
        payload = Payload(kept[0].payload.sections, kept[1], self.codec)
        assert payload.read("buffers_float").tolist() == [7.0] * 3
        sent = payload.read("trainable").double()
        self.bench.settle(update, fate)
        self.outbox.drop(update)
        self.used += sent if fate == "used" else 0

    def missing(self) -> float:
        """The largest element of what was learned, and is neither used, on its way nor kept."""
        residual = self.keep.now(KIND).get(RESIDUAL, torch.zeros(COUNT)).double()
        way = torch.zeros(COUNT, dtype=torch.float64)
        for _, update in self.outbox.waiting():
            kept = self.outbox.get(update)
            assert kept is not None
            way += Payload(kept[0].payload.sections, kept[1], self.codec).read("trainable").double()
        return float((self.learned - self.used - way - residual).abs().max())


def steady() -> Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(5))


def no_fetch(info: BlobInfo, dest: memoryview) -> None:
    raise AssertionError(f"{info.id} lies in the order")


@pytest.mark.parametrize("spec", SPECS)
def test_used_and_kept_add_up_to_what_was_learned(tmp_path: Path, spec: str) -> None:
    """Orders overlap; outcomes come in any order; processes die before a result is listed, after,
    and between an outcome and the end of its result."""
    life = Life(tmp_path, spec)
    chance = random.Random(3)
    open_: list[str] = []
    for _ in range(25):
        if chance.random() < 0.2:
            life.outbox.mortal = "put"
            with pytest.raises(Killed):
                life.do()
            life.orders -= 1
            life.kill()
        open_.append(life.do())
        if chance.random() < 0.2:
            life.kill()
        while open_ and chance.random() < 0.6:
            update = open_.pop(chance.randrange(len(open_)))
            fate = chance.choice(["used", "used", "discarded", "superseded"])
            if chance.random() < 0.3:
                life.outbox.mortal = "drop"
                used = life.used.clone()
                with pytest.raises(Killed):
                    life.settle(update, fate)
                life.used = used  # the server tells it again
                life.kill()
            life.settle(update, fate)
        assert life.missing() < 1e-4
    life.keep.close()
    life.outbox.close()


def test_a_snapshot_carries_no_residual_and_leaves_none(tmp_path: Path) -> None:
    life = Life(tmp_path, "topk:0.01+ef")
    life.do("continue")
    held = {u for _, u in life.outbox.waiting()}
    assert held == {"o1.0", "o1.0.s1"}
    one, other = (bytes(life.outbox.get(u)[1]) for u in sorted(held))  # type: ignore[index]
    assert one == other
    life.settle("o1.0.s1", "discarded")
    life.settle("o1.0", "used")
    assert life.missing() < 1e-4


def test_what_was_left_out_many_times_is_sent_in_the_end(tmp_path: Path) -> None:
    """Without error feedback the smallest element never goes: with it, it does."""
    for spec, arrives in (("topk:0.05", False), ("topk:0.05+ef", True)):
        life = Life(tmp_path / spec, spec)
        steady = torch.linspace(0.5, 1.0, COUNT)
        life.trainer.delta = lambda steady=steady: steady  # type: ignore[method-assign,misc]
        for _ in range(40):
            life.settle(life.do(), "used")
        assert bool(life.used[0]) == arrives
        life.outbox.close()


def test_a_decay_forgets_and_a_codec_of_a_former_life_gives_nothing_back(tmp_path: Path) -> None:
    life = Life(tmp_path, "topk:0.01+ef:decay=0.5")
    first = life.do()
    residual = life.keep.now(KIND)[RESIDUAL].clone()
    life.trainer.delta = lambda: torch.zeros(COUNT)  # type: ignore[method-assign]
    second = life.do()
    sent = life.outbox.get(second)
    assert sent is not None
    carried = Payload(sent[0].payload.sections, sent[1], life.codec).read("trainable")
    left = life.keep.now(KIND)[RESIDUAL]
    torch.testing.assert_close(carried + left, 0.5 * residual, rtol=0, atol=1e-5)
    life.bench._packs.clear()  # started again, and another codec was agreed
    life.settle(first, "discarded")
    torch.testing.assert_close(life.keep.now(KIND)[RESIDUAL], left, rtol=0, atol=1e-5)
    assert 4 * COUNT < INLINE


def test_a_codec_without_feedback_goes_on_from_what_it_remembers(tmp_path: Path) -> None:
    """PowerSGD's Q gets better from order to order, over kills and whatever became of the update;
    a snapshot leaves none of its own, and nothing is given back that was never kept."""
    life = Life(tmp_path, "powersgd:1,bits=32")
    life.trainer.delta = steady  # type: ignore[method-assign]
    life.codec = life.bench.up

    def lost(fate: str, asked: Then | None = None) -> float:
        """How far the next update is from what was learned."""
        update = life.do(asked)
        kept = life.outbox.get(update)
        assert kept is not None
        payload = Payload(kept[0].payload.sections, kept[1], life.codec)
        found = float((payload.read("trainable") - steady()).norm())
        life.settle(update, fate)
        return found

    one = life.codec
    assert isinstance(one, PowerSGD)
    state, expected = one.start(COUNT), list[float]()
    for _ in range(5):
        packed, state = one.encode_from(steady(), state)
        got = one.decoder(packed, COUNT)(0, COUNT, torch.empty(COUNT))
        expected.append(float((got - steady()).norm()))
    assert expected == sorted(expected, reverse=True)
    assert expected[0] > expected[4]
    found = [lost("used"), lost("discarded"), lost("used", "continue")]
    life.kill()
    life.trainer.delta = steady  # type: ignore[method-assign]
    life.codec = life.bench.up
    found += [lost("superseded"), lost("used")]
    assert found == pytest.approx(expected, rel=1e-5)
    assert set(life.keep.now(KIND)) == {"codec/q"}


def test_another_rank_begins_with_another_q(tmp_path: Path) -> None:
    life = Life(tmp_path, "powersgd:1+ef")
    life.do()
    other = parse("powersgd:3+ef")
    life.bench.agree(tensors.codec_for(MANIFEST, other), life.bench.down, other.feedback)
    life.do()
    assert life.keep.now(KIND)["codec/q"].numel() == 3 * 100
