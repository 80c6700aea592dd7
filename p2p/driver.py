"""Driver: a peer's machines on real time: the rendezvous, its all-reduces, its model and its disk.

One task owns the rendezvous and everybody else posts to its queue. What binds the peer is on its
disk before anything that follows from it is said. The model is changed by another task
(`holding.py`), and local work (`labour.py`) is begun in its order, from the model it left.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from atoll.aggregation.allreduce import Done, Fail, PartReady, Plan
from atoll.aggregation.rendezvous import Rendezvous
from atoll.aggregation.rendezvous_events import (
    Abort,
    Apply,
    BeatDue,
    Bound,
    Download,
    Downloaded,
    Drop,
    Get,
    Heard,
    Leaving,
    Load,
    MeanFailed,
    MeanMade,
    PeerAction,
    PeerEvent,
    Reduce,
    Say,
    Started,
    TrainOn,
    Wake,
)
from atoll.aggregation.rendezvous_messages import Stand, Value
from atoll.aggregation.seals import RECENT, Seals
from atoll.p2p.contribution import Contribution, packer
from atoll.p2p.exchange import Exchange
from atoll.p2p.former import Former
from atoll.p2p.holding import Holding
from atoll.p2p.labour import Labour, Training
from atoll.p2p.memory import Memory
from atoll.p2p.post import Letter, Part, Post
from atoll.p2p.reducing import Fetch
from atoll.p2p.tally import Tally
from atoll.p2p.terms import Terms
from atoll.protocols.blobs import Blob
from atoll.protocols.errors import RemoteError

DOWNLOAD = 8  # bytes an element of a model with the momentum of its outer step
QUEUE = 10_000  # events that wait; what others say beyond is lost, as on a network
# In silences after which a peer is taken for lost. One that has the last model stays
STAY = 24  # at most so long, for those near who have it not
MEET = 4  # at least so long where it comes back with it: those who need it must find it first

logger = logging.getLogger(__name__)


class Driver:
    """`run` it in a loop where `post` and the shelf are served. It ends when it has left, or some
    time after the last round."""

    def __init__(
        self,
        me: str,
        terms: Terms,
        work: Training,
        memory: Memory,
        *,
        steps: Callable[[], int],
        post: Post,
        fetch: Fetch,
        seals: Seals,
        watch: Callable[[Tally], None] = lambda tally: None,
    ) -> None:
        """`steps()`: local steps of this peer in a round. `fetch`: as `bulk.fetch`, of a blob."""
        self.me, self.terms, self.tally = me, terms, Tally()
        self._work, self._memory, self._seals = work, memory, seals
        self._post, self._watch = post, watch
        loop = asyncio.get_running_loop()
        self.clock = loop.time
        self._events: asyncio.Queue[PeerEvent] = asyncio.Queue()
        up, down = terms.ways.up[0], terms.ways.down[0]
        self._codec = packer(down)
        self.exchange = Exchange(
            me, work.engine.state.anchor.numel(), up=up, down=down, fetch=fetch, clock=self.clock,
            tell=lambda peer, attempt, ready: post.send(peer, Part.of(attempt, ready)),
            over=self._over, most=terms.most, kept=memory.packed_mean,
        )  # fmt: skip
        self.holding = Holding(
            me, work.engine, memory, self.tally,
            fetch=fetch, say=self.say, spawn=self._spawn, tidy=self._tidy,
        )  # fmt: skip
        self._labour = Labour(
            me, work, self.tally, up, steps=steps, say=self.say, ended=self._ended
        )  # fmt: skip
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] = loop.create_future()
        self._machine: Rendezvous
        self._bound: Bound

    # ---- life ----------------------------------------------------------------------------------

    async def recall(self) -> bool:
        """Take up what the disk remembers of this peer, if anything; False where that is not whole,
        or its last word was a goodbye: then it must come under another name, which its promises do
        not bind. Who comes for the first time and made another first model, as another version of
        torch may, downloads the run's; PeerError FL-P408 where that is the founder, whom the others
        take theirs from."""
        kept = await asyncio.to_thread(self._memory.recall, self.terms.run)
        size, patience = self._work.engine.state.anchor.numel(), self.terms.patience
        if kept is None or kept.peer != self.me:
            start = self.terms.first(self.me, self._work.facts.init)
            self._machine = Rendezvous(self.me, size, (self.terms.founder,), start, patience)
        elif kept.bound.parted:  # it was killed before it could forget
            return False
        else:
            former = Former(self._memory, self.exchange, self._work.engine, self._codec)
            model = await asyncio.to_thread(former.model, kept.bound, self.terms.start)
            if model is None:
                return False
            self._work.engine.load(model)
            self._machine = Rendezvous.again(self.me, size, kept.bound, patience)
        self._machine.root = self.terms.start
        self._machine.most, self._machine.seals = self.terms.share, self._seals
        self._machine.replay = max(1, min(RECENT, DOWNLOAD * size // self._codec.size(size)))
        self._bound = self._machine.bound()
        self.tally.round = max(0, self._machine.stand.epoch)
        return True

    async def run(self) -> None:
        """PeerError where its disk fails."""
        stand, model = self._machine.stand, self._work.engine.state
        await self.holding.start(stand)
        await self._bind(self._bound, anyway=True)
        await self.holding.digest(stand, model)
        self.say(Started())
        jobs = asyncio.create_task(self.holding.change())
        turn = asyncio.create_task(self._turn())
        try:
            await self._any(turn, jobs)
            settled = asyncio.create_task(self._settle())
            self._tasks.add(settled)
            await self._any(settled, jobs)
        finally:
            self.tally.state = "left" if self._machine.parted else "ended"
            self._watch(self.tally)
            training = [self._labour.task] if self._labour.task else []
            tasks = [jobs, turn, *self._tasks, *training]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.exchange.turn()
            if not self._failed.done():
                self._failed.cancel()
        if self._machine.parted:
            await asyncio.to_thread(self._memory.retire)

    async def _any(self, *tasks: asyncio.Task[None]) -> None:
        """Until one of them, or anything that runs beside, ends; what it raised is raised."""
        ends = {*tasks, self._failed}
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for one in done:
            one.result()

    async def _settle(self) -> None:
        """What was decided is applied and kept, what was said is out."""
        await self.holding.settled()
        await self._post.flush(1.0)

    def leave(self) -> None:
        self.say(Leaving())

    def say(self, event: PeerEvent) -> None:
        """To the rendezvous."""
        self._events.put_nowait(event)

    def heard(self, peer: str, letter: Letter) -> None:
        """From the post."""
        if isinstance(letter, Part):
            self.exchange.hear(letter.attempt, PartReady(peer, letter.part, letter.digest))
        elif self._events.qsize() < QUEUE:
            self.say(Heard(peer, letter))

    async def find(self, peer: str, name: str) -> Blob:
        """For a shelf: what this peer gives to another."""
        if name.startswith("state/"):
            return self.holding.shelved.find(name)
        return await self.exchange.find(peer, name)

    def others(self) -> dict[str, dict[str, object]]:
        """Where each other peer stands, as far as is known here, for people."""
        now, roster = self.clock(), self._machine.roster
        return {
            peer: {
                "round": known.stand.epoch,
                "ready": known.ready,
                "silent": round(now - known.heard, 1) if known.heard > 0 else None,  # seconds
                "left": peer in self._machine.farewells,
            }
            for peer, known in sorted(roster.items())
            if peer != self.me
        }

    # ---- the rendezvous ------------------------------------------------------------------------

    async def _turn(self) -> None:
        until: float | None = None
        met = self.clock() + MEET * self.terms.patience.silence if self._done() else 0.0
        while not self._machine.left and (until is None or self.clock() < until):
            event = await self._events.get()
            actions = self._machine.handle(event, self.clock())
            await self._bind(self._machine.bound())
            self.tally.round = max(0, self._machine.stand.epoch)
            for action in actions:
                self._do(action)
            if isinstance(event, Downloaded):
                self.holding.let_go()
            if isinstance(event, BeatDue):
                self.exchange.beat()
                self.tally.missing = tuple(self._machine.missing(self.clock()))
                self._watch(self.tally)
            if until is None and self._done():
                self.tally.state = "done"
                until = self.clock() + STAY * self.terms.patience.silence
            if until is not None and self.clock() >= met and self._all_done():
                break

    def _done(self) -> bool:
        return 0 < self.terms.rounds <= self._machine.stand.epoch

    def _all_done(self) -> bool:
        """Whether nobody near may still need the last mean of this peer, nor this peer the last
        model of theirs: it is known what bits they have."""
        here, since = self._machine, self.clock() - self.terms.patience.silence
        others = [k for p, k in here.roster.items() if p != self.me and k.heard > since]
        if here.loading is not None or not here.bits:
            return False
        return all(k.stand.rank >= here.stand.rank and bool(k.bits) for k in others)

    async def _bind(self, bound: Bound, anyway: bool = False) -> None:
        if bound == self._bound and not anyway:
            return
        if bound.stand != self._bound.stand:
            # The new model can be made again from the one before, which must be there for that.
            await self.holding.saved.wait()
            self.holding.saved.clear()
        self._bound = bound
        await asyncio.to_thread(self._memory.bind, self.terms.run, self.me, bound)

    def _do(self, action: PeerAction) -> None:
        match action:
            case Say(peer, message):
                self._post.send(peer, message)
            case Reduce(chain, ballot, plan, deadline):
                self._reduce(chain, ballot, plan, deadline)
            case Drop(chain, ballot):
                self.exchange.drop(_attempt(chain, ballot))
            case Get(chain, digest, holders):
                self._spawn(self._get(chain, digest, holders))
            case Apply(value, used):
                self._apply(value, used)
            case Download(stand, donors, bits):
                self._spawn(self.holding.download(stand, donors, bits))
            case Load(stand):
                self._load(stand)
            case TrainOn(stand):
                self.holding.then(lambda: self._train_on(stand))
            case Abort(reason):
                self.tally.aborts += 1
                self.tally.why = reason
                logger.warning("peer=%s round=%d put off: %s", self.me, self.tally.round, reason)
            case Wake(at):
                asyncio.get_running_loop().call_at(at, self.say, BeatDue())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not self._failed.done():
            self._failed.set_exception(error)

    # ---- means ---------------------------------------------------------------------------------

    def _reduce(self, chain: str, ballot: tuple[int, str], plan: Plan, deadline: float) -> None:
        mine: Contribution | None = None
        if dict(plan.contributors()).get(self.me):
            mine = self._labour.ready(chain)
            if mine is None:
                self.say(MeanFailed(chain, f"{self.me} has no work to give", ballot))
                return
        self.exchange.begin(_attempt(chain, ballot), plan, deadline, mine)

    def _over(self, attempt: str, end: Done | Fail) -> None:
        chain, count, proposer = attempt.split("/")
        ballot = int(count), proposer
        match end:
            case Done(digest):
                self._spawn(self._made(chain, digest, ballot))
            case Fail(reason, missing, spoiled):  # pragma: no branch
                logger.info("peer=%s attempt=%s failed: %s", self.me, attempt, reason)
                self.say(MeanFailed(chain, reason, ballot, missing, spoiled))

    async def _made(self, chain: str, digest: str, ballot: tuple[int, str] | None) -> None:
        """On disk first: a vote for it must outlive this process."""
        if digest in self.exchange:
            await asyncio.to_thread(self._memory.keep_mean, self.exchange.mean(digest))
            self.say(MeanMade(chain, digest, ballot))

    async def _get(self, chain: str, digest: str, holders: Sequence[str]) -> None:
        try:
            await self.exchange.get(digest, holders)
        except RemoteError as error:
            self.say(MeanFailed(chain, str(error)))
        else:
            await self._made(chain, digest, None)

    # ---- the model -----------------------------------------------------------------------------

    def _apply(self, value: Value, used: bool) -> None:
        mean, stand = self.exchange.mean(value.digest), self._machine.stand
        parts, payloads = self.exchange.sent(value.digest)
        given = self._labour.take()
        self.exchange.turn(value.digest)
        self.tally.group, self.tally.weights = value.group, value.weights
        self.tally.rounds_joined += used
        logger.info(
            "peer=%s round=%d group=%d mean=%s",
            self.me,
            stand.epoch,
            len(value.group),
            mean.digest[:12],
        )
        if used and given is not None and parts:
            self.holding.then(lambda: self._labour.left_out(given, parts, payloads))
        self.holding.commit(stand, mean.values)

    def _load(self, stand: Stand) -> None:
        if self.holding.load(stand):
            self.exchange.turn()
            self._labour.take()
            self.tally.downloads += 1
        else:  # only its bits were others: work and attempts go on
            self.tally.healed += 1

    async def _tidy(self, stand: Stand) -> None:
        """The model of `stand` is on the disk: what is not needed to come back goes."""
        if self._bound.stand == stand:
            recent = {step.last.value.digest for step in self._machine.recent}
            spare = {self.holding.wanted, *self.exchange.digests(), *recent}
            old = self._memory.old(self._bound, spare)
            await asyncio.to_thread(self._memory.remove, old)

    async def _train_on(self, stand: Stand) -> None:
        await self._labour.stop()
        if not self.terms.rounds or stand.epoch < self.terms.rounds:
            self._labour.begin(stand)


def _attempt(chain: str, ballot: tuple[int, str]) -> str:
    return f"{chain}/{ballot[0]}/{ballot[1]}"
