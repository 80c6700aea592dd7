"""Panel: versions judged by clients."""

from atoll.server.panel import Panel


def test_the_mean_is_weighted_by_examples_and_waits_for_all() -> None:
    panel = Panel()
    panel.offer(3)
    assert panel.ask(["a", "b", "c"]) == 3
    assert panel.answer("a", 3, {"accuracy": 0.5, "loss": 2.0}, 30) is None
    assert panel.answer("c", 3, {}, 0) is None  # it has no test data
    assert panel.answer("b", 3, {"accuracy": 1.0, "loss": 0.0}, 10) == (
        3,
        {"accuracy": (0.5 * 30 + 1.0 * 10) / 40, "loss": 1.5, "examples": 40.0},
    )
    assert panel.lacking() == {}


def test_a_metric_that_one_client_lacks_is_that_of_the_others() -> None:
    """It was taken from all: one client that diverged kept a run from its target."""
    panel = Panel()
    panel.offer(1)
    panel.ask(["a", "b", "c", "d"])
    panel.answer("a", 1, {"accuracy": 0.5, "loss": 2.0}, 30)
    panel.answer("b", 1, {"loss": 1.0}, 10)
    panel.answer("d", 1, {"recall": 1.0}, 0)  # of no examples: nobody's word
    assert panel.answer("c", 1, {"accuracy": 0.9}, 10) == (
        1,
        {"accuracy": (0.5 * 30 + 0.9 * 10) / 40, "loss": 1.75, "examples": 50.0},
    )
    assert panel.lacking() == {"b": ["accuracy"], "c": ["loss"]}
    assert panel.lacking() == {}  # it has been said


def test_one_version_is_out_at_a_time_and_the_newest_waits() -> None:
    panel = Panel()
    panel.offer(1)
    assert panel.ask(["a"]) == 1
    panel.offer(2)
    panel.offer(4)
    panel.offer(3)
    assert panel.ask(["a"]) is None
    assert panel.answer("a", 1, {"accuracy": 0.1}, 5) == (1, {"accuracy": 0.1, "examples": 5.0})
    assert panel.ask(["a"]) == 4
    assert panel.ask(["a"]) is None


def test_nobody_to_ask_leaves_the_version_waiting() -> None:
    panel = Panel()
    assert panel.ask(["a"]) is None
    panel.offer(1)
    assert panel.ask([]) is None
    assert panel.ask(["a"]) == 1


def test_who_leaves_is_not_waited_for() -> None:
    panel = Panel()
    panel.offer(1)
    panel.ask(["a", "b"])
    assert panel.answer("a", 1, {"loss": 1.0}, 2) is None
    assert panel.gone("b") == (1, {"loss": 1.0, "examples": 2.0})
    assert panel.gone("b") is None


def test_answers_to_another_version_or_from_others_do_not_count() -> None:
    panel = Panel()
    panel.offer(1)
    panel.ask(["a"])
    assert panel.answer("a", 0, {"loss": 1.0}, 2) is None
    assert panel.answer("b", 1, {"loss": 1.0}, 2) is None
    assert panel.gone("a") is None  # nobody answered: no metrics, and the next may be asked
    panel.offer(2)
    assert panel.ask(["a"]) == 2


def test_who_is_late_is_left_and_asked_again_when_it_has_answered() -> None:
    """One that hung ended all judging of a run."""
    panel = Panel()
    panel.offer(1)
    panel.ask(["a", "b"])
    assert panel.close() is None  # nobody has judged it
    panel.offer(2)
    assert panel.ask(["a", "b"]) is None  # both still have to answer
    assert panel.answer("a", 1, {"loss": 5.0}, 2) is None  # too late, and free again
    assert panel.ask(["a", "b"]) == 2
    assert panel.asked == {"a"}
    assert panel.answer("a", 2, {"loss": 1.0}, 2) == (2, {"loss": 1.0, "examples": 2.0})
    panel.offer(3)
    panel.gone("b")  # it left, and came back as another process
    assert panel.ask(["a", "b"]) == 3
    panel.answer("b", 3, {"loss": 2.0}, 2)
    assert panel.close() == (3, {"loss": 2.0, "examples": 2.0})
    assert (panel.late, panel.busy) == ({"a"}, False)
    assert panel.close() is None
