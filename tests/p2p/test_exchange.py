"""Exchanges of one process, joined by a loopback fetch: same bits, exact means, nothing leaks."""

import asyncio
import hashlib
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor

from atoll.aggregation.allreduce import Done, Fail, Part, PartReady, Plan, whole
from atoll.aggregation.part_mean import part_mean
from atoll.p2p.bulk import Got
from atoll.p2p.contribution import Contribution, packer
from atoll.p2p.exchange import Exchange
from atoll.p2p.reducing import AHEAD, Mean
from atoll.protocols.codecs import Fp32, as_bytes
from atoll.protocols.codecspec import Chain, parse
from atoll.protocols.errors import RemoteError, UsageError

SIZE = 9000
NAMES = ("a", "b", "c")
CUTS = (Part("a", 0, 4096), Part("b", 4096, 8000), Part("c", 8000, SIZE))
PLAN = Plan(NAMES, (1.0, 2.0, 0.5), CUTS)
FP32 = parse("fp32")


@dataclass
class Loop:
    """Peers in one event loop; what one fetches is read from the other's `find`."""

    up: Chain = FP32
    down: Chain = FP32
    most: float = math.inf
    spoil: Callable[[str, str, memoryview], None] | None = None  # (from, blob, bytes)
    ends: dict[str, Done | Fail] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)
    peers: dict[str, Exchange] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._news = asyncio.Event()
        for name in NAMES:
            self.peers[name] = Exchange(
                name,
                SIZE,
                up=self.up,
                down=self.down,
                fetch=self._fetch_of(name),
                tell=self._tell,
                over=partial(self._over, name),
                clock=asyncio.get_running_loop().time,
                most=self.most,
            )

    def _over(self, name: str, attempt: str, end: Done | Fail) -> None:
        assert name not in self.ends, "an attempt ends once"
        self.ends[name] = end
        self._news.set()

    def _tell(self, peer: str, attempt: str, message: PartReady) -> None:
        asyncio.get_running_loop().call_soon(self.peers[peer].hear, attempt, message)

    def _fetch_of(self, me: str) -> Callable[..., Awaitable[Got]]:
        async def fetch(peer: str, name: str, dest: memoryview, shorter: bool) -> Got:
            try:
                found = await self.peers[peer].find(me, name)
            except RemoteError:
                self.refused.append((me, name))
                raise
            assert shorter or len(found.view) == len(dest)
            dest[: len(found.view)] = found.view
            if self.spoil is not None:
                self.spoil(peer, name, dest[: len(found.view)])
            sha256 = hashlib.sha256(dest[: len(found.view)]).digest()
            return Got(sha256, len(found.view))

        return fetch

    def begin(self, contributions: dict[str, Contribution], plan: Plan = PLAN) -> None:
        deadline = asyncio.get_running_loop().time() + 20
        for name in plan.group:
            self.peers[name].begin("chain/1/a", plan, deadline, contributions.get(name))

    async def ended(self, *names: str) -> None:
        async with asyncio.timeout(20):
            while not set(names) <= set(self.ends):
                await self._news.wait()
                self._news.clear()

    async def attempt(self, contributions: dict[str, Contribution], plan: Plan = PLAN) -> None:
        self.begin(contributions, plan)
        await self.ended(*plan.group)


def deltas(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(SIZE, generator=generator) for name in NAMES}


def by_hand(given: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    parts = [part_mean([d[p.start : p.stop] for d in given], weights)[0] for p in CUTS]
    return torch.cat(parts)


class Louder(Fp32):
    """What a reducer sends that wants to be heard alone."""

    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        return super().encode(values * 1000, out)


@pytest.mark.parametrize("up", ["fp32", "randomk:0.01"])
def test_a_reducer_whose_mean_is_too_long_is_not_believed(up: str) -> None:
    async def work(lies: bool) -> Loop:
        loop, given = Loop(up=parse(up), most=10.0), deltas()
        if lies:
            loop.peers["b"]._down = Louder()
        mine = {name: Contribution(given[name], parse(up)) for name in NAMES}
        lengths = tuple(mine[name].length for name in NAMES)
        await loop.attempt(mine, Plan(NAMES, PLAN.weights, CUTS, lengths))
        return loop

    assert all(isinstance(end, Done) for end in asyncio.run(work(lies=False)).ends.values())
    ends = asyncio.run(work(lies=True)).ends
    for end in (ends["a"], ends["c"]):
        assert isinstance(end, Fail)
        assert end.missing == ("b",)
        assert end.reason.startswith("b gives a mean of length")


@pytest.mark.parametrize(
    "codec", ["fp32", "bf16", "int8", "int4+ef", "e3m0", "topk:0.1+ef", "sign+ef", "int8+zstd"]
)
def test_all_of_a_group_hold_the_same_bits_whatever_the_codec(codec: str) -> None:
    async def work() -> None:
        loop, given = Loop(up=parse(codec), down=parse("int8")), deltas()
        kept = {name: given[name].clone() for name in NAMES}
        mine = {name: Contribution(given[name], parse(codec)) for name in NAMES}
        await loop.attempt(mine)
        means = [loop.peers[name].mean(end.digest) for name, end in loop.ends.items()]  # type: ignore[union-attr]
        assert all(torch.equal(mean.values, means[0].values) for mean in means)
        assert all(torch.equal(given[name], kept[name]) for name in NAMES), "never written to"
        # What was sent and what is left out are all there was; the mean is of what was sent.
        decoded = []
        for name in NAMES:
            parts, payloads = loop.peers[name].sent(means[0].digest)
            out = torch.empty(SIZE)
            for part, payload in zip(parts, payloads, strict=True):
                decode = packer(parse(codec)).decoder(payload, part.stop - part.start)
                here = out[part.start : part.stop]
                here.copy_(decode(0, len(here), torch.empty(len(here))))
            decoded.append(out)
            left = mine[name].left_out(parts, payloads)
            assert (left is not None) == ("+ef" in codec)
            if left is not None:
                torch.testing.assert_close(out + left, given[name])
        exact = by_hand(decoded, PLAN.weights)
        assert float((means[0].values - exact).abs().max()) <= float(exact.abs().max()) / 254 * 1.01

    asyncio.run(work())


def test_an_fp32_mean_is_exactly_the_weighted_mean_in_the_plans_order() -> None:
    async def work() -> None:
        loop, given = Loop(), deltas()
        await loop.attempt({name: Contribution(given[name], FP32) for name in NAMES})
        for name, end in loop.ends.items():
            assert isinstance(end, Done)
            exact = by_hand([given[n] for n in NAMES], PLAN.weights)
            assert torch.equal(loop.peers[name].mean(end.digest).values, exact)

    asyncio.run(work())


def test_of_each_peer_two_parts_are_on_their_way_and_the_first_come_first() -> None:
    """So the first can be reduced, and their results fetched, while the last still come."""

    async def work() -> None:
        loop, given = Loop(), deltas()
        parts = tuple(Part("a", at, at + 1000) for at in range(0, SIZE, 1000))
        plan = Plan(NAMES, (1.0, 1.0, 1.0), parts)
        fetch, asked, under_way, most = loop.peers["a"]._fetch, [], 0, 0

        async def watched(peer: str, name: str, dest: memoryview, shorter: bool) -> Got:
            nonlocal under_way, most
            if peer == "b":
                asked.append(name.rpartition("/")[2])
                under_way += 1
                most = max(most, under_way)
                await asyncio.sleep(0.001)
            got = await fetch(peer, name, dest, shorter)
            under_way -= peer == "b"
            return got

        loop.peers["a"]._fetch = watched
        mine = {name: Contribution(given[name], FP32) for name in NAMES}
        await loop.attempt(mine, plan)
        assert all(isinstance(end, Done) for end in loop.ends.values())
        assert asked == [str(i) for i in range(9)]
        assert most == AHEAD

    asyncio.run(work())


def test_weight_0_contributes_nothing_and_gets_the_mean() -> None:
    async def work() -> None:
        loop, given = Loop(), deltas()
        plan = Plan(NAMES, (1.0, 0.0, 0.5), CUTS)
        await loop.attempt({name: Contribution(given[name], FP32) for name in "ac"}, plan)
        ends = set(loop.ends.values())
        assert len(ends) == 1
        exact = by_hand([given["a"], given["c"]], (1.0, 0.5))
        end = ends.pop()
        assert isinstance(end, Done)
        assert torch.equal(loop.peers["b"].mean(end.digest).values, exact)
        assert loop.peers["b"].sent(end.digest) == ((), ())

    asyncio.run(work())


def test_an_input_that_is_not_finite_is_named_and_changes_nothing() -> None:
    async def work() -> None:
        for codec in ("fp32", "int8"):
            loop, given = Loop(up=parse(codec)), deltas()
            given["b"][8500] = math.nan
            loop.begin({name: Contribution(given[name], parse(codec)) for name in NAMES})
            await loop.ended("c")
            assert loop.ends["c"] == Fail("not finite: b", (), ("b",))
            for name in NAMES:
                loop.peers[name].turn()

    asyncio.run(work())


def test_a_part_as_long_as_many_counts_for_no_more_than_most_medians() -> None:
    async def work() -> None:
        loop, given = Loop(most=1.0), deltas()
        given["b"] *= 1e6
        await loop.attempt({name: Contribution(given[name], FP32) for name in NAMES})
        end = loop.ends["a"]
        assert isinstance(end, Done)
        assert float(loop.peers["a"].mean(end.digest).values.norm()) < 200

    asyncio.run(work())


def test_an_input_goes_to_the_reducer_of_its_part_alone_and_a_result_to_the_group() -> None:
    async def work() -> None:
        loop, given = Loop(), deltas()
        await loop.attempt({name: Contribution(given[name], FP32) for name in NAMES})
        find = loop.peers["a"].find
        assert len((await find("b", "in/chain/1/a/1")).view) == 4 * (8000 - 4096)
        assert len((await find("c", "out/chain/1/a/0")).view) == 4 * 4096
        for peer, name in (
            ("b", "in/chain/1/a/2"),
            ("stranger", "in/chain/1/a/1"),
            ("stranger", "out/chain/1/a/0"),
            ("b", "out/chain/1/a/1"),
            ("b", "in/chain/1/a/7"),
            ("b", "in/chain/1/a/x"),
            ("b", "mean/00/0"),
            ("b", "garbage"),
        ):
            with pytest.raises(RemoteError) as refused:
                await find(peer, name)
            assert refused.value.code == "FL-P402", name

    asyncio.run(work())


def test_a_mean_that_was_missed_is_fetched_checked_and_kept_for_one_epoch() -> None:
    async def work() -> None:
        loop, given = Loop(down=parse("int8+zstd")), deltas()
        plan = Plan(("a", "b"), (1.0, 1.0), (Part("a", 0, 5000), Part("b", 5000, SIZE)))
        await loop.attempt({name: Contribution(given[name], FP32) for name in "ab"}, plan)
        end = loop.ends["a"]
        assert isinstance(end, Done)
        for name in "ab":
            loop.peers[name].turn(end.digest)
        found = await loop.peers["c"].get(end.digest, ("c", "b", "a"))
        assert torch.equal(found.values, loop.peers["a"].mean(end.digest).values)
        again = await loop.peers["a"].get(end.digest, ())
        assert again is loop.peers["a"].mean(end.digest)
        loop.peers["c"].turn()

        def flip(_: str, name: str, data: memoryview) -> None:
            if not name.endswith("parts"):
                data[-1] ^= 1

        loop.spoil = flip
        with pytest.raises(RemoteError) as refused:
            await loop.peers["c"].get(end.digest, ("a",))
        assert refused.value.code == "FL-W105"
        loop.spoil = None
        loop.peers["a"].turn()
        with pytest.raises(RemoteError) as gone:
            await loop.peers["c"].get(end.digest, ("a",))
        assert gone.value.code == "FL-P402"
        with pytest.raises(RemoteError) as nobody:
            await loop.peers["c"].get(end.digest, ())
        assert nobody.value.code == "FL-P404"

    asyncio.run(work())


def test_lists_of_parts_that_are_not_the_whole_are_refused() -> None:
    async def work() -> None:
        loop = Loop()
        for said in (
            b"", b"{}", b"[[1]]", b"[]", b'[["a", 0, 9, "d"]]', b'[["a", 0, 0, "d"]]',
            f'[["a", 0, 0, "d"], ["a", 0, {SIZE}, "d"]]'.encode(),
            f'[["a", 0, {SIZE}, "d"], ["b", {SIZE}, {SIZE}, "d"]]'.encode(),
        ):  # fmt: skip
            with pytest.raises(RemoteError) as refused:
                loop.peers["a"]._index(said)
            assert refused.value.code == "FL-W101", said

    asyncio.run(work())


def test_results_that_do_not_decode_or_are_not_finite_are_never_used() -> None:
    async def work() -> None:
        def poison(peer: str, name: str, data: memoryview) -> None:
            if peer == "b" and name.startswith("out/"):
                data[:4] = b"\x00\x00\xc0\x7f"  # NaN

        loop, given = Loop(spoil=poison), deltas()
        deadline = asyncio.get_running_loop().time() + 0.2
        for name in NAMES:
            mine = Contribution(given[name], FP32)
            loop.peers[name].begin("chain/1/a", PLAN, deadline, mine)
        async with asyncio.timeout(20):
            while len(loop.ends) < 3:
                await asyncio.sleep(0.05)
                for name in NAMES:
                    loop.peers[name].beat()
        assert isinstance(loop.ends["b"], Done)
        assert loop.ends["a"] == Fail("still without b", ("b",))

    asyncio.run(work())


def test_a_missed_mean_that_is_not_finite_is_never_used() -> None:
    async def work() -> None:
        loop, poison = Loop(), torch.full((SIZE,), math.nan)
        payload = as_bytes(poison)
        parts, digests = (Part("a", 0, SIZE),), (hashlib.sha256(payload).hexdigest(),)
        digest = whole(iter(digests))
        loop.peers["a"]._means[digest] = Mean(digest, parts, digests, (payload,), poison)
        with pytest.raises(RemoteError) as refused:
            await loop.peers["b"].get(digest, ("a",))
        assert refused.value.code == "FL-P403"

    asyncio.run(work())


def test_a_residual_is_dropped_where_it_is_much_longer_than_the_work() -> None:
    delta, long = torch.ones(64), torch.full((64,), 20.0)
    rule = parse("topk:0.1+ef:decay=0.5,reset=10")
    assert Contribution(delta, rule, long)._whole is delta
    torch.testing.assert_close(Contribution(delta, rule, delta)._whole, torch.full((64,), 1.5))


def test_a_codec_of_whole_matrices_is_refused_with_a_sentence() -> None:
    with pytest.raises(UsageError) as refused:
        packer(parse("powersgd:4"))
    assert refused.value.code == "FL-P401"
