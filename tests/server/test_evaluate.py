"""The evaluator: newest version first, in nobody's way, whatever a judge may do."""

import queue
import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from atoll.server.evaluate import Evaluator
from tests.conftest import Logged


class Slow:
    """A judge that waits at a gate: `asked` says which version it is about to judge."""

    def __init__(self) -> None:
        self.asked: queue.Queue[float] = queue.Queue()
        self.go: queue.Queue[None] = queue.Queue()
        self.value = 0.0

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.value = float(tensors["v"])

    def evaluate(self) -> Mapping[str, float]:
        self.asked.put(self.value)
        self.go.get(timeout=10)
        if self.value == 13:
            raise ZeroDivisionError("an unlucky model")
        return {"accuracy": self.value / 100}


class Heard:
    def __init__(self) -> None:
        self.news: queue.Queue[tuple[int, Mapping[str, float] | None]] = queue.Queue()

    def report(self, version: int, metrics: Mapping[str, float]) -> None:
        self.news.put((version, metrics))

    def failed(self, version: int) -> None:
        self.news.put((version, None))


def read(version: int) -> Mapping[str, Tensor]:
    if version == 7:
        raise OSError("pruned")
    return {"v": torch.tensor(float(version))}


def made() -> tuple[Evaluator, Slow, Heard]:
    judge, heard = Slow(), Heard()
    return Evaluator(judge, read, heard.report, heard.failed), judge, heard


def test_versions_that_a_slow_judge_cannot_keep_up_with_are_skipped() -> None:
    evaluator, judge, heard = made()
    evaluator.offer(1)
    assert judge.asked.get(timeout=10) == 1
    for version in (2, 3, 4):  # offered while it judges: no one waits, and the newest is next
        evaluator.offer(version)
    judge.go.put(None)
    assert judge.asked.get(timeout=10) == 4
    judge.go.put(None)
    assert heard.news.get(timeout=10) == (1, {"accuracy": 0.01})
    assert heard.news.get(timeout=10) == (4, {"accuracy": 0.04})
    evaluator.close()
    assert heard.news.empty()


def test_a_judge_that_fails_is_told_and_the_next_version_is_judged() -> None:
    evaluator, judge, heard = made()
    for version in (13, 7):
        evaluator.offer(version)
        if version == 13:
            judge.go.put(None)
        assert heard.news.get(timeout=10) == (version, None)
    evaluator.offer(8)
    judge.go.put(None)
    assert heard.news.get(timeout=10) == (8, {"accuracy": 0.08})
    evaluator.close()


class Failing:
    """A judge that fails in the way that the version says: leaves with 10s, or gives no number."""

    way = 0.0

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.way = float(tensors["v"]) // 10

    def evaluate(self) -> Mapping[str, float]:
        if self.way == 1:
            raise SystemExit(1)
        return {"accuracy": "good"}  # type: ignore[dict-item]


def test_what_a_judge_does_amiss_is_its_own_and_said_once(logged: Logged) -> None:
    """`sys.exit()` ended the thread, and so all evaluations; text for a number ended the run."""
    heard = Heard()
    evaluator = Evaluator(Failing(), read, heard.report, heard.failed)
    for version in (10, 11, 20, 12):
        evaluator.offer(version)
        assert heard.news.get(timeout=10) == (version, None)
    evaluator.close()
    said = [line.split(" could not be evaluated: ") for line in logged.text.splitlines()]
    assert [version for version, _ in said] == ["version=10", "version=20", "version=12"]
    assert "FL-C104: the trainer's evaluate() failed: SystemExit(1)" in said[0][1]
    assert "FL-C104: the trainer's evaluate() gave accuracy='good'" in said[1][1]


def test_closing_ends_after_the_version_in_work_and_leaves_one_that_waits() -> None:
    evaluator, judge, heard = made()
    evaluator.offer(1)
    judge.asked.get(timeout=10)
    evaluator.offer(2)
    closing = threading.Thread(target=evaluator.close)
    closing.start()
    judge.go.put(None)
    closing.join(10)
    assert not closing.is_alive()
    assert heard.news.get(timeout=10)[0] == 1
    assert heard.news.empty()
    assert judge.asked.empty()


def test_closing_gives_up_on_a_judge_that_does_not_come_back() -> None:
    evaluator, judge, heard = made()
    evaluator.offer(1)
    judge.asked.get(timeout=10)
    evaluator.close(seconds=0.01)
    assert heard.news.empty()  # it closed before the judge came back
    judge.go.put(None)
    assert heard.news.get(timeout=10)[0] == 1


def test_an_evaluator_without_work_closes_at_once() -> None:
    evaluator, judge, heard = made()
    closing = threading.Thread(target=evaluator.close, daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()
    assert judge.asked.empty()
    assert heard.news.empty()
