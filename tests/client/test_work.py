"""The workbench: from a model's bytes to an update's bytes, with one warm trainer."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atoll.client.algorithm import local_algorithm
from atoll.client.holding import Beside
from atoll.client.keep import Keep
from atoll.client.outbox import Outbox
from atoll.client.trainer import Task, Trained
from atoll.client.work import Dropped, Workbench
from atoll.protocols import tensors
from atoll.protocols.blobs import INLINE, BlobInfo
from atoll.protocols.codecs import codec
from atoll.protocols.codecspec import ErrorFeedback
from atoll.protocols.errors import AtollError, ClientError, RemoteError
from atoll.protocols.events import Then
from atoll.protocols.manifest import Manifest, TensorSpec
from atoll.protocols.messages import Order, Result
from atoll.protocols.payload import Payload, check, parse
from atoll.protocols.sent import Sent

MANIFEST = Manifest(
    (
        TensorSpec("w", (2, 3), "float32", "trainable"),
        TensorSpec("mean", (2,), "float32", "buffers_float"),
        TensorSpec("count", (), "int64", "buffers_other"),
        TensorSpec("b", (2,), "float32", "trainable"),
    )
)
LARGE = Manifest((TensorSpec("w", (INLINE // 4 + 1,), "float32", "trainable"),))
START = {
    "w": torch.arange(6.0).reshape(2, 3),
    "mean": torch.tensor([0.5, 1.5]),
    "count": torch.tensor(7),
    "b": torch.tensor([10.0, 20.0]),
}


class Adding:
    """Adds `by` to all values, step by step, as a trainer that looks and reports must."""

    def __init__(self, by: float = 0.25) -> None:
        self.by = by
        self.loads = 0
        self.tasks: list[Task] = []
        self.values: dict[str, Tensor] = {}
        self.error: Exception | None = None

    def load(self, values: Mapping[str, Tensor]) -> None:
        if isinstance(self.error, ValueError):
            raise self.error
        self.loads += 1
        self.values = dict(values)  # trained in place: they are ours

    def train(self, task: Task) -> Trained:
        if self.error is not None:
            raise self.error
        self.tasks.append(task)
        done = 0
        for done in range(1, task.steps + 1):
            for value in self.values.values():
                value += self.by if value.is_floating_point() else 1
            task.report(done)
            then = task.asked()
            if then == "continue":
                task.snapshot(Trained(self.values, done, done * 32, {"loss": 2.0}))
            elif then is not None:
                break
        return Trained(self.values, done, done * 32, {"loss": 1.0})

    def evaluate(self) -> Mapping[str, float]:
        return {"sum": float(self.values["b"][0])}


def no_fetch(info: BlobInfo, dest: memoryview) -> None:
    raise AssertionError(f"{info.id} lies in the order")


def packed(
    values: Mapping[str, Tensor], down: str = "fp32", manifest: Manifest = MANIFEST
) -> tuple[BlobInfo, bytes]:
    """A model as a server sends it."""
    chosen = codec(down)
    sections = tensors.sections_of(manifest, chosen)
    data = bytearray(sum(s.length for s in sections))
    groups = {g: tensors.flatten(manifest, values, g) for g in ("trainable", "buffers_float")}
    flat = {**groups, "buffers_other": tensors.flatten(manifest, values, "buffers_other")}
    tensors.pack(manifest, flat, chosen, memoryview(data))
    digest = hashlib.sha256(data).digest()
    return BlobInfo(f"v3/{down}", len(data), digest, sections), bytes(data)


def order(
    steps: int = 4, down: str = "fp32", number: int = 1, extra: Mapping[str, float] | None = None
) -> Order:
    info, data = packed(START, down)
    return Order(f"o{number}", 0, 3, steps, info, data, extra or {})


def bench(
    trainer: Adding, folder: Path | None = None, up: str = "fp32", manifest: Manifest = MANIFEST
) -> Workbench:
    return Workbench(trainer, manifest, codec(up), codec("fp32"), Outbox(folder))


def asks(*answers: Then | None) -> Callable[[], Then | None]:
    """What is answered at each look; nothing after the last."""
    left = list(answers)
    return lambda: left.pop(0) if left else None


def do(
    made: Workbench,
    given: Order,
    asked: Callable[[], Then | None] | None = None,
    reports: list[int] | None = None,
    snapshots: list[Result] | None = None,
) -> Result:
    told: list[int] = [] if reports is None else reports
    seen: list[Result] = [] if snapshots is None else snapshots
    return made.do(given, no_fetch, asked or asks(), told.append, seen.append)


def update(made: Workbench, result: Result) -> Payload:
    kept = made.outbox.get(result.update)
    assert kept is not None
    assert kept[0] == result
    return parse(made.manifest, result.payload.sections, kept[1], made.up, "update")


def test_an_update_is_base_minus_local_with_buffers_as_they_are() -> None:
    trainer = Adding(0.25)
    made = bench(trainer)
    result = do(made, order(steps=4))
    payload = update(made, result)
    assert torch.equal(payload.read("trainable"), torch.full((8,), -1.0))
    assert torch.equal(payload.read("buffers_float"), START["mean"] + 1.0)
    assert payload.read("buffers_other").tolist() == [11]
    assert (result.steps, result.examples, result.metrics) == (4, 128, {"loss": 1.0})
    assert (result.update, result.final, result.payload.id) == ("o1.0", True, "u/o1.0.0")
    assert result.train_seconds >= 0
    assert torch.equal(START["w"], torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("up", ["fp16", "bf16"])
def test_an_update_is_packed_as_the_run_wants_it(up: str) -> None:
    made = bench(Adding(0.25), up=up)
    payload = update(made, do(made, order()))
    assert {s.codec for s in payload.sections if s.group == "trainable"} == {up}
    assert torch.equal(payload.read("trainable"), torch.full((8,), -1.0))


def test_a_trainer_is_told_where_its_data_order_stands_and_what_the_strategy_says() -> None:
    trainer = Adding()
    made = bench(trainer)
    do(made, order(steps=4, number=1))
    do(made, order(steps=2, number=2, extra={"mu": 0.1}))
    do(made, order(steps=1, number=3))
    assert [task.done for task in trainer.tasks] == [0, 4, 6]
    assert [dict(task.extra) for task in trainer.tasks] == [{}, {"mu": 0.1}, {}]


def test_the_first_report_says_that_the_model_is_here() -> None:
    reports: list[int] = []
    do(bench(Adding()), order(steps=3), reports=reports)
    assert reports == [0, 1, 2, 3]


def test_asked_to_send_a_client_sends_what_it_has() -> None:
    made = bench(Adding())
    result = do(made, order(steps=9), asks(None, "send", "send"))
    assert result.steps == 2
    assert torch.equal(update(made, result).read("trainable"), torch.full((8,), -0.5))


def test_asked_to_drop_nothing_is_kept() -> None:
    made = bench(Adding())
    with pytest.raises(Dropped):
        do(made, order(steps=9), asks(None, "drop", "drop", "drop"))
    with pytest.raises(Dropped):  # told so after its last step
        do(made, order(steps=1), asks(None, "drop"))
    assert made.outbox.waiting() == ()
    assert made.outbox.steps == 0


def test_asked_to_continue_a_client_hands_over_a_snapshot_and_trains_on() -> None:
    made, snapshots = bench(Adding(0.25)), list[Result]()
    result = do(made, order(steps=4), asks("continue", None, "continue"), snapshots=snapshots)
    assert [s.update for s in snapshots] == ["o1.0.s1", "o1.0.s2"]
    assert [s.final for s in (*snapshots, result)] == [False, False, True]
    assert [s.steps for s in (*snapshots, result)] == [1, 3, 4]
    moved = [update(made, s).read("trainable")[0].item() for s in (*snapshots, result)]
    assert moved == [-0.25, -0.75, -1.0]
    assert made.outbox.steps == 4
    assert len({s.payload.id for s in (*snapshots, result)}) == 3


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("a cable is loose"), "FL-C104", "a cable is loose"),
        (ValueError("w: (3,)"), "FL-C103", "does not fit the run's model: w: (3,)"),
        (ClientError("FL-D105", "no data"), "FL-D105", "no data"),
    ],
)
def test_a_trainer_that_fails_is_told_as_what_it_is(error: Exception, code: str, said: str) -> None:
    trainer = Adding()
    trainer.error = error
    made = bench(trainer)
    with pytest.raises(AtollError, match=r".") as failed:
        do(made, order())
    assert failed.value.code == code
    assert said in failed.value.message
    assert made.outbox.waiting() == ()


def test_what_is_no_number_never_leaves_the_client() -> None:
    made = bench(Adding(float("nan")))
    with pytest.raises(AtollError, match="is nan") as failed:
        do(made, order())
    assert failed.value.code == "FL-W106"
    assert made.outbox.waiting() == ()


def test_a_model_of_other_tensors_is_refused() -> None:
    info, data = packed({"w": torch.zeros(INLINE // 4 + 1)}, manifest=LARGE)
    with pytest.raises(RemoteError) as refused:
        do(bench(Adding()), Order("o1", 0, 3, 1, info, data))
    assert refused.value.code == "FL-W104"


def test_a_trainer_that_loses_a_tensor_is_found_out() -> None:
    class Losing(Adding):
        def train(self, task: Task) -> Trained:
            trained = super().train(task)
            return Trained({"w": trained.tensors["w"]}, trained.steps, 32, {})

    with pytest.raises(ClientError, match="is missing") as failed:
        do(bench(Losing()), order())
    assert failed.value.code == "FL-C103"


def test_evaluating_loads_the_version_and_trains_nothing() -> None:
    trainer = Adding()
    info, data = packed(START)
    assert bench(trainer).evaluate(Sent(1, info, data), no_fetch) == {"sum": 10.0, "examples": 1}
    assert (trainer.loads, trainer.tasks) == (1, [])


def test_a_client_that_does_not_say_how_many_examples_it_judged_by_weighs_as_in_an_average() -> (
    None
):
    """Without a number its word was passed over, silently."""
    trainer = Adding()
    trainer.examples = 30  # type: ignore[attr-defined]
    sent = Sent(1, *packed(START))
    assert bench(trainer).evaluate(sent, no_fetch)["examples"] == 30
    trainer.evaluate = lambda: {"sum": 1.0, "examples": 7}  # type: ignore[method-assign]
    assert bench(trainer).evaluate(sent, no_fetch)["examples"] == 7
    trainer.evaluate = dict  # type: ignore[method-assign]
    assert bench(trainer).evaluate(sent, no_fetch) == {}  # it has no test data


def test_a_metric_that_is_not_finite_is_left_out() -> None:
    """The server refuses a message with one, and it came again from the outbox."""

    class Diverging(Adding):
        def train(self, task: Task) -> Trained:
            return replace(super().train(task), metrics={"loss": float("nan"), "n": 1.0})

        def evaluate(self) -> Mapping[str, float]:
            return {"loss": float("inf")}

    made = bench(Diverging())
    assert do(made, order()).metrics == {"n": 1.0}
    assert made.evaluate(Sent(1, *packed(START)), no_fetch) == {}


class Fetching:
    """A server's bulk side."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.fetched: list[str] = []
        self.broken = False

    def __call__(self, info: BlobInfo, dest: memoryview) -> None:
        self.fetched.append(info.id)
        dest[:] = self.data
        if self.broken:
            dest[:4] = b"\xff" * 4
            raise ClientError("FL-C101", "cut")


def fetched(made: Workbench, given: Order, fetch: Fetching) -> Result:
    return made.do(given, fetch, asks(), list[int]().append, list[Result]().append)


@pytest.mark.parametrize("folder", [True, False])
def test_a_big_model_is_fetched_once_for_several_orders(tmp_path: Path, folder: bool) -> None:
    trainer = Adding(1.0)
    made = bench(trainer, tmp_path if folder else None, manifest=LARGE)
    info, data = packed({"w": torch.zeros(INLINE // 4 + 1)}, manifest=LARGE)
    fetch = Fetching(data)
    for number in (1, 2):
        result = fetched(made, Order(f"o{number}", 0, 3, 2, info), fetch)
        assert torch.equal(
            update(made, result).read("trainable"), torch.full((INLINE // 4 + 1,), -2.0)
        )
    assert fetch.fetched == ["v3/fp32"]
    assert (tmp_path / "model.bin").exists() == folder
    assert (tmp_path / "o1.0.bin").exists() == folder
    made.outbox.close()


def test_a_version_that_came_broken_is_fetched_again(tmp_path: Path) -> None:
    made = bench(Adding(1.0), tmp_path, manifest=LARGE)
    info, data = packed({"w": torch.zeros(INLINE // 4 + 1)}, manifest=LARGE)
    fetch = Fetching(data)
    fetch.broken = True
    given = Order("o1", 0, 3, 2, info)
    with pytest.raises(ClientError):
        fetched(made, given, fetch)
    fetch.broken = False
    result = fetched(made, given, fetch)
    assert torch.equal(update(made, result).read("trainable")[:4], torch.full((4,), -2.0))
    other = BlobInfo(info.id, info.size, b"", info.sections)  # its bytes are not known before
    fetched(made, Order("o2", 0, 3, 2, other), fetch)
    fetched(made, Order("o3", 0, 3, 2, other), fetch)
    assert len(fetch.fetched) == 4
    made.outbox.close()


def test_a_model_of_another_size_gets_a_buffer_of_its_own(tmp_path: Path) -> None:
    made = bench(Adding(1.0), tmp_path, manifest=LARGE)
    info, data = packed({"w": torch.zeros(INLINE // 4 + 1)}, manifest=LARGE)
    fetched(made, Order("o1", 0, 3, 2, info), Fetching(data))
    odd = BlobInfo("v4/fp32", info.size - 4, b"4" * 32, info.sections)
    with pytest.raises(RemoteError) as refused:
        fetched(made, Order("o2", 0, 4, 2, odd), Fetching(data[4:]))
    assert refused.value.code == "FL-W104"
    result = fetched(made, Order("o3", 0, 3, 2, info), Fetching(data))
    assert torch.equal(update(made, result).read("trainable")[:4], torch.full((4,), -2.0))
    made.outbox.close()


# ---- vectors beside the model ------------------------------------------------------------------


def beside(**vectors: list[float]) -> tuple[BlobInfo, bytes]:
    sections = tensors.extra_sections({name: len(v) for name, v in vectors.items()})
    data = b"".join(torch.tensor(v).numpy().tobytes() for v in vectors.values())
    return BlobInfo("v3/extra", len(data), hashlib.sha256(data).digest(), sections), data


def test_vectors_come_inline_or_are_fetched_once_for_several_orders(tmp_path: Path) -> None:
    info, data = beside(control=[1.0, 2.0], direction=[3.0, 4.0])
    holding = Beside({"control": 2, "direction": 2}, tmp_path)
    fetched: list[str] = []

    def fetch(wanted: BlobInfo, dest: memoryview) -> None:
        fetched.append(wanted.id)
        dest[:] = data

    for inline in (data, b"", b""):
        found = holding.take(replace(order(), extras=((info, inline),)), fetch)
        assert {name: v.tolist() for name, v in found.items()} == {
            "control": [1.0, 2.0], "direction": [3.0, 4.0],
        }  # fmt: skip
    assert fetched == ["v3/extra"]


def test_a_vector_of_ones_own_comes_once_it_is_not_zero(tmp_path: Path) -> None:
    own = beside(variate=[5.0, 6.0])
    holding = Beside({"control": 2}, tmp_path, {"variate": 2})
    first = holding.take(replace(order(), extras=(beside(control=[1.0, 2.0]),)), no_fetch)
    assert sorted(first) == ["control"]
    found = holding.take(replace(order(), extras=(beside(control=[1.0, 2.0]), own)), no_fetch)
    assert found["variate"].tolist() == [5.0, 6.0]
    with pytest.raises(RemoteError, match="FL-W104"):
        Beside({"control": 2}, None).take(
            replace(order(), extras=(beside(control=[1.0, 2.0]), own)), no_fetch
        )
    with pytest.raises(RemoteError, match=r"FL-W104.*20 bytes, at most 16"):
        holding.take(replace(order(), extras=((beside(variate=[0.0] * 5)[0], b""),)), no_fetch)


@pytest.mark.parametrize(
    ("extras", "code"),
    [
        ((), "FL-C103"),
        ((beside(direction=[1.0, 2.0]),), "FL-W104"),
        ((beside(control=[1.0, 2.0, 3.0]),), "FL-W104"),
        ((beside(other=[1.0, 2.0]),), "FL-W104"),
    ],
)
def test_wrong_vectors_are_one_clear_error(
    extras: tuple[tuple[BlobInfo, bytes], ...], code: str
) -> None:
    with pytest.raises(AtollError) as caught:
        Beside({"control": 2}, None).take(replace(order(), extras=extras), no_fetch)
    assert caught.value.code == code


def test_no_more_is_fetched_than_was_expected() -> None:
    info, _ = beside(control=[0.0] * 9)
    with pytest.raises(RemoteError, match="FL-W104"):
        Beside({"control": 2}, None).take(replace(order(), extras=((info, b""),)), no_fetch)


def test_what_a_trainer_makes_besides_travels_after_the_delta(tmp_path: Path) -> None:
    class Varied(Adding):
        algorithm = local_algorithm("scaffold")

        def train(self, task: Task) -> Trained:
            said = {"steps": 4.0, "lr": 0.5, "life": float(task.life), "epoch": 0.0, "commits": 0.0}
            made = super().train(task)
            return replace(made, extras={"dc": torch.arange(8.0)}, said=said)

    made = bench(Varied(), tmp_path, up="bf16")
    given = replace(order(), extras=(beside(control=[0.0] * 8),))
    result = do(made, given)
    kept = made.outbox.get(result.update)
    assert kept is not None
    extras = {"dc": 8, "said": 5}
    payload = parse(MANIFEST, result.payload.sections, kept[1], codec("bf16"), "update", extras)
    assert payload.read("extra:dc").tolist() == list(range(8))
    assert payload.read("extra:said").tolist() == [4.0, 0.5, float(made.keep.life), 0.0, 0.0]
    for wrong in ({"dc": 8}, {**extras, "more": 2}, {"dc": 7, "said": 5}):
        with pytest.raises(RemoteError, match="FL-W104"):
            check(MANIFEST, result.payload.sections, len(kept[1]), codec("bf16"), "update", wrong)


def test_a_trainer_that_makes_nothing_besides_is_told_so() -> None:
    class Silent(Adding):
        algorithm = local_algorithm("scaffold")

    given = replace(order(), extras=(beside(control=[0.0] * 8),))
    with pytest.raises(ClientError, match=r"FL-C103.*'dc'"):
        do(bench(Silent()), given)


def test_private_state_is_written_before_the_result_that_it_belongs_to(tmp_path: Path) -> None:
    """Killed between the two, the order is trained again; the other way round it would be lost."""
    seen: list[bool] = []

    class Looking(Outbox):
        def put(self, result: Result, view: memoryview) -> None:
            seen.append((tmp_path / "keep" / f"{result.update}.pending").exists())
            super().put(result, view)

    outbox, keep = Looking(tmp_path), Keep(tmp_path / "keep")
    made = Workbench(Adding(), MANIFEST, codec("fp32"), codec("fp32"), outbox, keep)
    made.agree(codec("topk:0.5"), codec("fp32"), ErrorFeedback())
    do(made, order())
    assert seen == [True]
