"""Labour: work that is not finite is done again, and what is ready is given to its round alone."""

import asyncio
from dataclasses import dataclass, field

import torch
from torch import Tensor

from atoll.aggregation.allreduce import Part
from atoll.aggregation.rendezvous_events import StepsDone
from atoll.aggregation.rendezvous_messages import Stand
from atoll.p2p.labour import Labour
from atoll.p2p.tally import Tally
from atoll.protocols.codecspec import parse
from tests.jumping import run
from tests.p2p.swarm import Done, Trainee

FIRST, SECOND = Stand(0, "first", 0.0), Stand(1, "second", 1.0)


@dataclass
class Bench(Trainee):
    """Gives what lies in `turns`, and then works for ever."""

    turns: list[Done] = field(default_factory=list)

    async def train(self, steps: int) -> Done:
        if not self.turns:
            await asyncio.Event().wait()
        return self.turns.pop(0)


@dataclass
class Made:
    labour: Labour
    said: list[StepsDone]
    tally: Tally


def made(*turns: Done, up: str = "fp32") -> Made:
    said: list[StepsDone] = []
    tally = Tally()
    labour = Labour(
        "a", Bench("a", turns=list(turns)), tally, parse(up), steps=lambda: 5, say=said.append,
        ended=lambda task: None,
    )  # fmt: skip
    return Made(labour, said, tally)


async def over(labour: Labour) -> None:
    assert labour.task is not None
    await labour.task


def test_work_that_is_not_finite_is_done_again_and_counts_as_steps_only() -> None:
    async def work() -> None:
        one = made(Done(torch.zeros(4), 0.0, loss=9.0), Done(torch.full((4,), 2.0)))
        one.labour.begin(FIRST)
        await over(one.labour)
        assert one.said == [StepsDone("first", 4.0)]
        assert (one.tally.steps, one.tally.loss_first, one.tally.state) == (10, 1.0, "averaging")

    run(work)


def test_what_is_ready_is_for_the_round_that_it_was_trained_for_and_is_taken_once() -> None:
    async def work() -> None:
        labour = made(Done(torch.ones(4))).labour
        assert labour.take() is None
        labour.begin(FIRST)
        assert labour.ready("first") is None
        await over(labour)
        given = labour.ready("first")
        assert given is not None
        assert labour.ready("second") is None
        assert labour.take() is given
        assert labour.ready("first") is None

    run(work)


def test_work_that_is_stopped_says_nothing() -> None:
    async def work() -> None:
        one = made()
        await one.labour.stop()
        one.labour.begin(FIRST)
        await asyncio.sleep(1.0)
        await one.labour.stop()
        assert one.labour.task is None
        assert one.said == []

    run(work)


def test_what_a_codec_left_out_of_a_mean_is_added_to_the_next_rounds_work() -> None:
    """The second work is nothing: what is given is what the first kept back."""

    async def work() -> None:
        first: Tensor = torch.tensor([1.0, 8.0, 2.0, 4.0])
        labour = made(Done(first), Done(torch.zeros(4)), up="topk:0.25+ef").labour
        labour.begin(FIRST)
        await over(labour)
        given = labour.take()
        assert given is not None
        parts = (Part("a", 0, 4),)
        await labour.left_out(given, parts, given.packed(parts))
        labour.begin(SECOND)
        await over(labour)
        again = labour.take()
        assert again is not None
        assert again.length == torch.tensor([1.0, 2.0, 4.0]).norm()

    run(work)
