"""A server as one of the peers: its versions are the models that the peers make."""

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atoll.aggregation.averager import in_parts
from atoll.aggregation.outer import STEPS, Nesterov, outer
from atoll.aggregation.sync_engine import SyncEngine, SyncState
from atoll.protocols.codecs import codec
from atoll.protocols.errors import UsageError
from atoll.protocols.manifest import Manifest, TensorSpec
from atoll.protocols.payload import parse
from atoll.protocols.tensors import pack
from atoll.server.draft import Version
from atoll.server.items import Item, UpdateBytes
from atoll.server.joint import LATE, JointMerger
from atoll.server.merge import InterruptedMergeError, MergeStats
from atoll.server.versions import VersionStore

COUNT = 1003
MANIFEST = Manifest((TensorSpec("w", (COUNT,), "float32", "trainable"),))


def random(seed: int) -> Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(seed))


class Answer:
    def __init__(self, state: SyncState, counted: bool) -> None:
        self.state, self.counted = state, counted


class Others:
    """A group of this server and one peer, whose work is `theirs`; all by the real engine."""

    def __init__(self, start: Tensor, theirs: Tensor) -> None:
        self.engine, self.theirs = SyncEngine(Nesterov(), start), theirs
        self.silent = threading.Event()

    def average(self, base: Tensor, delta: Tensor) -> Answer | None:
        if self.silent.is_set():
            return None
        if not torch.equal(base, self.engine.state.anchor):
            return Answer(self.engine.state, False)
        mean, _ = in_parts([delta, self.theirs], [1.0, 1.0])
        return Answer(self.engine.commit(mean), True)

    def interrupt(self) -> None:
        self.silent.set()


def items(*deltas: Tensor, weights: Sequence[float] = (0.25, 0.75)) -> list[Item]:
    made = []
    for i, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
        sections, data = pack(MANIFEST, {"trainable": delta}, codec("fp32"))
        read = parse(MANIFEST, sections, data.toreadonly(), codec("fp32"), "update")
        made.append((UpdateBytes(f"o{i}.0", read), weight))
    return made


class Run:
    def __init__(self, folder: Path) -> None:
        self.store = VersionStore(folder, MANIFEST)
        self.version = self.store.initial({"w": random(0)})
        self.others = Others(random(0), random(9))
        self.merger = JointMerger(MANIFEST, outer("nesterov"), self.others)

    def merge(self, given: list[Item]) -> tuple[Version, MergeStats]:
        draft = self.store.draft(self.version.number + 1, self.version.number, self.merger.vectors)
        try:
            stats = self.merger.merge(self.version, draft, given)
        except BaseException:
            draft.abandon()
            raise
        self.version = draft.seal()
        return self.version, stats


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_version_is_the_model_of_the_peers(run: Run) -> None:
    """Two rounds against the formula: clients' mean, then that of both, then Nesterov's step."""
    x, v = random(0), torch.zeros(COUNT)
    for number in range(2):
        mine = [random(10 + number), random(20 + number)]
        version, stats = run.merge(items(*mine))
        g = (0.25 * mine[0] + 0.75 * mine[1] + random(9)) / 2
        v = 0.9 * v + g
        x = x - 0.7 * (g + 0.9 * v)
        assert torch.allclose(version.flat("trainable"), x, atol=1e-5)
        assert torch.equal(version.flat("trainable"), run.others.engine.state.anchor)
        assert torch.equal(version.outer["momentum"], run.others.engine.state.outer["momentum"])
        assert int(version.outer[STEPS]) == number + 1
        assert stats.used == ("o0.0", "o1.0")
        assert stats.stats["delta_norm"] > 0


def test_work_on_a_model_that_the_peers_have_left_counts_nothing(run: Run) -> None:
    run.others.engine.commit(random(5))
    newest = run.others.engine.state
    version, stats = run.merge(items(random(1), random(2)))
    assert torch.equal(version.flat("trainable"), newest.anchor)
    assert stats.used == ()
    assert stats.dropped == (("o0.0", LATE), ("o1.0", LATE))
    assert run.others.engine.state is newest
    _, stats = run.merge(items(random(1), random(2)))  # from the newest it counts again
    assert stats.used == ("o0.0", "o1.0")


def test_an_update_that_is_not_finite_is_dropped_before_the_peers_see_it(run: Run) -> None:
    bad = random(1)
    bad[7] = float("nan")
    version, stats = run.merge(items(bad, random(2)))
    assert stats.used == ("o1.0",)
    assert [update for update, _ in stats.dropped] == ["o0.0"]
    other = SyncEngine(Nesterov(), random(0))
    mean, _ = in_parts([random(2), random(9)], [1.0, 1.0])
    assert torch.equal(version.flat("trainable"), other.commit(mean).anchor)


def test_without_work_the_version_is_the_one_before(run: Run) -> None:
    bad = torch.full((COUNT,), float("inf"))
    version, stats = run.merge(items(bad, weights=(1.0,)))
    assert torch.equal(version.flat("trainable"), random(0))
    assert (stats.used, len(stats.dropped)) == ((), 1)
    assert run.others.engine.state.round == 0


def test_a_server_that_stops_makes_no_version(run: Run) -> None:
    run.merger.interrupt()
    with pytest.raises(InterruptedMergeError):
        run.merge(items(random(1), random(2)))
    assert 1 not in run.store.numbers()
    run.merger.close()


def test_a_merge_that_waits_for_others_is_none_for_the_loop(run: Run) -> None:
    assert run.merger.learns


def test_a_model_with_buffers_is_refused(run: Run) -> None:
    with_buffers = Manifest((*MANIFEST.tensors, TensorSpec("m", (3,), "float32", "buffers_float")))
    with pytest.raises(UsageError, match="buffers"):
        JointMerger(with_buffers, outer("nesterov"), run.others)
