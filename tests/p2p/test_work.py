"""A peer's training half: the same work for the same step of the run, moments that live on."""

import asyncio
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from atoll.client.models import manifest_of
from atoll.p2p.work import Facts, Trained, Work, facts, facts_of
from atoll.protocols.errors import PeerError, UsageError


@dataclass(frozen=True)
class Small:
    """A manifest's training half."""

    model: str = "charlm:width=32,depth=1"
    data: str = "topics:context=16"
    seed: int = 7
    local_steps: int = 4
    batch: int = 4
    lr: float = 3e-3
    outer: str = "nesterov:lr=0.7,momentum=0.9"
    rounds: int = 0


def worked(work: Work, steps: int = 4) -> Trained:
    return asyncio.run(work.train(steps))


def test_the_same_peer_does_the_same_work_and_another_peer_other_work() -> None:
    one, again, other = (Work(Small(), None, shard=who) for who in ("a", "a", "b"))
    works = [worked(work) for work in (one, again, other)]
    assert torch.equal(works[0].delta, works[1].delta)
    assert not torch.equal(works[0].delta, works[2].delta)
    assert one.engine.state.digest == other.engine.state.digest
    assert (works[0].steps, works[0].tokens, works[0].factor) == (4, 4 * 4 * 16, 1.0)
    assert works[0].loss > 3


def test_two_peers_learn_together_and_hold_the_same_bits() -> None:
    peers = [Work(Small(), None, shard=who) for who in "ab"]
    first = peers[0].evaluate()
    for _ in range(5):
        mean = sum((worked(peer).delta for peer in peers), torch.zeros(1)) / 2
        digests = {peer.engine.commit(mean).digest for peer in peers}
        assert len(digests) == 1
    assert peers[0].evaluate() < first - 0.1
    assert peers[0].sample(40) == peers[1].sample(40)
    assert len(peers[0].sample(40)) == 40


def test_moments_live_through_rounds_and_through_a_new_process(tmp_path: Path) -> None:
    """The third round of one who was restarted after the second is that of one who was not."""
    deltas = []
    for restarted in (False, True):
        folder = tmp_path / str(restarted)
        folder.mkdir()
        work = Work(Small(), folder, shard="a")
        for _ in range(2):
            work.engine.commit(worked(work).delta)
        if restarted:
            state = work.engine.state
            work = Work(Small(), folder, shard="a")
            work.engine.load(state)
        deltas.append(worked(work).delta)
    assert torch.equal(deltas[0], deltas[1])
    fresh = Work(Small(), None, shard="a")
    fresh.engine.load(state)
    assert not torch.equal(worked(fresh).delta, deltas[0])


def test_moments_that_were_torn_are_begun_anew(tmp_path: Path) -> None:
    work = Work(Small(), tmp_path, shard="a")
    kept = worked(work).delta
    file = tmp_path / "inner.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(worked(Work(Small(), tmp_path, shard="a")).delta, kept)


def test_a_disk_that_does_not_take_the_moments_is_told(tmp_path: Path) -> None:
    """What safetensors raises of a full disk is no OSError: it was called a bug."""
    (tmp_path / "inner.safetensors.tmp").mkdir()
    with pytest.raises(PeerError, match="cannot be kept") as refused:
        worked(Work(Small(), tmp_path, shard="a"))
    assert refused.value.code == "FL-P405"


def test_work_that_is_not_finite_counts_nothing_and_spoils_no_later_round() -> None:
    work = Work(Small(), None, shard="a")
    good = work.engine.state
    worked(work)
    work.engine.state = type(good)(torch.full_like(good.anchor, 1e30), good.outer, 1)
    spoiled = worked(work)
    assert (spoiled.factor, bool(spoiled.delta.any())) == (0.0, False)
    assert math.isnan(spoiled.loss)
    work.engine.load(good)
    after = worked(work)
    assert after.factor == 1.0
    assert bool(torch.isfinite(after.delta).all())


def test_cancelled_it_stops_after_a_step_and_can_train_again() -> None:
    work = Work(Small(), None, shard="a")
    seen: list[int] = []

    async def play() -> Trained:
        loop, begun = asyncio.get_running_loop(), asyncio.Event()

        def progress(step: int) -> None:
            seen.append(step)
            loop.call_soon_threadsafe(begun.set)

        long = asyncio.create_task(work.train(100_000, progress))
        await begun.wait()
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        return await work.train(2)

    assert asyncio.run(play()).steps == 2
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) < 100_000


def test_facts_are_those_of_the_model_that_every_peer_builds() -> None:
    found = facts(Small.model, Small.data, Small.seed)
    assert found == Work(Small(), None, shard="a").facts
    assert found != facts(Small.model, Small.data, 8)
    assert isinstance(found, Facts)
    assert found.elements == Work(Small(), None, shard=1).engine.state.anchor.numel()


def test_values_that_never_change_are_a_part_of_what_a_model_is() -> None:
    found = []
    for frozen in (0.0, 1.0):
        module = torch.nn.Linear(2, 2)
        with torch.no_grad():
            module.weight.fill_(1.0)
            module.bias.fill_(frozen)
        module.bias.requires_grad = False
        found.append(facts_of(manifest_of(module), dict(module.named_parameters())))
    assert found[0].init == found[1].init
    assert found[0].schema != found[1].schema


def test_a_model_with_buffers_is_refused() -> None:
    with pytest.raises(UsageError, match="buffers") as caught:
        facts("torch.nn:BatchNorm1d:num_features=4", "digits", 0)
    assert caught.value.code == "FL-S104"


def test_a_run_with_an_end_takes_shorter_steps_towards_it() -> None:
    ending, endless = (Work(Small(rounds=n), None, shard="a") for n in (2, 0))
    for work in (ending, endless):
        work.engine.state = type(work.engine.state)(
            work.engine.state.anchor, work.engine.state.outer, 1
        )
    assert float(worked(ending).delta.norm()) < 0.8 * float(worked(endless).delta.norm())
