"""Lies that are well formed: refused where they cannot be, bounded where they may."""

import math

import pytest

from atoll.protocols.blobs import BlobInfo
from atoll.protocols.errors import RemoteError
from atoll.protocols.messages import Result
from atoll.server import plausible
from atoll.server.run import Order

ORDER = Order("o1", "a", 0, 20, started=10.0)


def result(steps: int, snapshot: int = 0) -> Result:
    blob = BlobInfo("u/o1", 0, b"", ())
    return Result("o1", 0, steps, 640, 1.0, blob, {}, not snapshot, snapshot)


@pytest.mark.parametrize("snapshot", [0, 1])
@pytest.mark.parametrize("steps", [0, 21, 1 << 53])
def test_steps_that_nobody_ordered_are_refused(steps: int, snapshot: int) -> None:
    with pytest.raises(RemoteError, match=f"o1 is 20 steps, its result has {steps}") as refused:
        plausible.check_steps(result(steps, snapshot), ORDER)
    assert refused.value.code == "FL-W101"
    assert refused.value.fatal


def test_fewer_steps_are_let_through_and_none_where_it_was_asked_to_stop() -> None:
    for steps in (1, 20):
        plausible.check_steps(result(steps), ORDER)
    asked = Order("o1", "a", 0, 20, started=10.0, asked=True)
    plausible.check_steps(result(0), asked)
    with pytest.raises(RemoteError):
        plausible.check_steps(result(21), asked)


def test_no_training_took_longer_than_its_order_is_out() -> None:
    assert plausible.seconds(1e18, 10.0, 14.5, 0.0) == 4.5
    assert plausible.seconds(3.0, 10.0, 14.5, 0.0) == 3.0
    assert plausible.seconds(3.0, 10.0, 9.0, 0.0) == 0.0


def test_what_was_trained_while_the_server_was_away_counts_whole() -> None:
    """The run's clock stood still: by it the training took no time at all."""
    assert plausible.seconds(60.0, 10.0, 10.5, running_since=10.2) == 60.0
    assert plausible.seconds(60.0, None, 10.5, 0.0) == 60.0


def test_a_claim_of_examples_is_worth_the_bound_at_most() -> None:
    assert plausible.examples(1 << 53, 10_000) == 10_000
    assert plausible.examples(600, 10_000) == 600
    assert plausible.examples(1 << 53, 0) == 1 << 53


@pytest.mark.parametrize("value", [1.5, -0.1, 1e300, math.inf, math.nan])
def test_an_accuracy_beyond_all_is_no_accuracy(value: float) -> None:
    """One client's word would have ended the run: target reached."""
    assert plausible.judged({"accuracy": value, "loss": 3.0}) == {"loss": 3.0}
    assert plausible.judged({"accuracy": 1.0}) == {"accuracy": 1.0}
