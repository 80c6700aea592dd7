"""A swarm in virtual time: the peers' machines, a network that fails, small vectors, and no forks.

    print(Swarm([PeerModel("a"), PeerModel("b", dies=3.0)], Weather(loss=0.1), seed=7).run(5))

It drives `rendezvous.py` and `allreduce.py` as a real transport would, and checks at every commit
what a swarm promises: one successor to each model, the exact mean of those who are in it, the same
bits with all who have it. The same seed gives the same run.
"""

import hashlib
import math
import random
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from atoll.aggregation import allreduce
from atoll.aggregation.allreduce import AllReduce, ReduceEvent
from atoll.aggregation.circle import Patience
from atoll.aggregation.meter import Meter
from atoll.aggregation.quorum import quorum
from atoll.aggregation.rendezvous import Rendezvous
from atoll.aggregation.rendezvous_events import (
    Abort,
    Admitted,
    Apply,
    BeatDue,
    Bound,
    Digested,
    Download,
    Downloaded,
    Drop,
    Get,
    Heard,
    Leaving,
    Load,
    Lost,
    MeanFailed,
    MeanMade,
    Message,
    NotDownloaded,
    PeerAction,
    PeerEvent,
    Reduce,
    Say,
    Stand,
    Started,
    StepsDone,
    TrainOn,
    Wake,
)
from atoll.aggregation.shares import PIECE
from atoll.p2p.lies import DECISIONS, lies
from atoll.p2p.links import Links
from atoll.p2p.promises import Promises, Vector
from atoll.p2p.world import Network, PeerModel, Weather
from atoll.protocols import state

Listen = Callable[[float, str, PeerEvent, list[PeerAction]], None]

START = Stand(0, "start", 0.0)
MOST = 10.0  # medians of length that a mean may have
HEARD = 50  # messages that a liar may say again


@dataclass(frozen=True)
class Outcome:
    """What became of a swarm."""

    seconds: float  # virtual
    epochs: int  # of the slowest living peer
    forks: int  # models with two successors, or peers with different bits of one
    wrong: int  # means that were not exactly that of their group
    stalled: tuple[str, ...]  # living peers that did not come so far, though a quorum lives
    headless: bool  # too many of one group died at once, or all who can reduce: the rest waits.
    # Or whoever has the model gives other bits for it.
    aborts: int
    commits: dict[int, tuple[tuple[str, ...], tuple[float, ...]]]  # epoch -> group, weights

    @property
    def summary(self) -> str:
        return (
            f"{self.epochs} epochs in {self.seconds:.0f} s, {self.forks} forks, "
            f"{self.wrong} wrong means, stalled: {', '.join(self.stalled) or 'nobody'}"
        )

    @property
    def good(self) -> bool:
        return not (self.forks or self.wrong or self.stalled)


@dataclass
class _Peer:
    model: PeerModel
    machine: Rendezvous
    anchor: Vector
    loaded: tuple[str, Vector] = ("", [])  # the chain of a model that was downloaded
    alive: bool = False
    given: set[str] = field(default_factory=set)  # attempts that it has put its work out for
    lives: int = 0  # so far: what was begun in another is nothing in this
    handled: int = 0
    heard: deque[Message] = field(default_factory=lambda: deque(maxlen=HEARD))
    trained: str = ""  # the model it works on
    reduces: dict[str, AllReduce] = field(default_factory=dict)  # attempt -> its machine
    inputs: dict[str, dict[int, dict[str, Vector]]] = field(default_factory=dict)
    parts: dict[str, dict[int, Vector]] = field(default_factory=dict)  # reduced here, or fetched
    means: dict[str, Vector] = field(default_factory=dict)  # digest -> mean
    meter: Meter = field(default_factory=lambda: Meter(tiny=1, enough=1))


class Swarm:
    """`run` it once."""

    def __init__(
        self,
        peers: Sequence[PeerModel],
        weather: Weather | None = None,
        seed: int = 0,
        *,
        patience: Patience | None = None,
        size: int = 7,
        piece: int = PIECE,
        listen: Listen | None = None,
    ) -> None:
        self._listen, self._size = listen, size
        self._net = Network(weather or Weather(), f"swarm {seed}", self._lives)
        self._links = Links(self._net, {p.name: p.link for p in peers})
        self._epochs = {START.chain: 0}
        self._again: set[tuple[str, str]] = set()  # (peer, chain): work that was done twice
        self._false = [-0.5] * size  # a mean and a model, of a liar
        self._promises, self._aborts = Promises(), 0
        self._patience = patience or Patience()
        self._most = max(p.weight for p in peers)
        founders = tuple(sorted(p.name for p in peers if p.joins == 0))
        self._peers: dict[str, _Peer] = {}
        for model in peers:
            first = model.joins == 0
            machine = Rendezvous(
                model.name,
                size,
                founders,
                START if first else Stand(),
                self._patience,
                root=START,
                most=self._most,
                piece=piece,
            )
            for other in peers:
                machine.handle(Admitted(other.name, other.weight, other.bandwidth), 0.0)
            self._peers[model.name] = _Peer(model, machine, [0.0] * size)
            self._net.at(model.joins, partial(self._start, model.name))
            self._net.at(model.dies, partial(self._die, model.name))
            self._net.at(model.leaves, partial(self._hear, model.name, Leaving()))

    def run(self, epochs: int, until: float = 300.0) -> Outcome:
        """Until all who live have made so many epochs, or `until` seconds have passed."""
        while self._net.next_before(until):
            if self._net.now > 0 and not self._behind(epochs) and not self._short(epochs):
                break
        short, headless = self._short(epochs), self._headless()
        living = [p.machine.stand.epoch for p in self._peers.values() if p.alive]
        kept = self._promises
        return Outcome(
            self._net.now, min(living, default=0), kept.forks, kept.wrong,
            () if headless else tuple(short), headless and bool(short), self._aborts, kept.commits,
        )  # fmt: skip

    def _lives(self, name: str) -> bool:
        return self._peers[name].alive

    def _short(self, epochs: int) -> list[str]:
        """Who is not there yet: the living, those still to come, and who has other bits than the
        others at its model."""
        bits: dict[str, set[str]] = {}
        for p in self._peers.values():
            if p.alive:
                bits.setdefault(p.machine.stand.chain, set()).add(_sha256(p.anchor))
        other = {chain for chain, found in bits.items() if len(found) > 1}
        late = [
            name
            for name, p in self._peers.items()
            if self._expected(p) and p.machine.stand.chain in other
        ]
        return sorted({*late, *self._behind(epochs)})

    def _behind(self, epochs: int) -> list[str]:
        return [
            name
            for name, p in self._peers.items()
            if p.machine.stand.epoch < epochs and self._expected(p)
        ]

    def _expected(self, peer: _Peer) -> bool:
        return peer.alive or self._net.now < peer.model.joins or self._returning(peer)

    def _returning(self, peer: _Peer) -> bool:
        dead = peer.lives == 1 and not peer.alive and not peer.machine.left
        return dead and peer.model.returns < math.inf

    def _headless(self) -> bool:
        living = [p.machine for p in self._peers.values() if p.alive]
        if not living:
            return True
        newest = max(living, key=lambda m: m.stand.rank)
        names = [machine.me for machine in living]
        reducers = len(names) == 1 or any(self._peers[n].model.bandwidth for n in names)
        best = [m.me for m in living if m.stand == newest.stand]
        if all(self._peers[n].model.poisons for n in best):
            return True
        return not (reducers and quorum(names, newest.members, newest.gone()))

    # ---- lives -------------------------------------------------------------------------------

    def _send(self, sender: str, to: str, happen: Callable[[], None]) -> None:
        self._net.send(sender, to, happen, partial(self._hear, sender, Lost(to)))

    def _start(self, name: str) -> None:
        peer = self._peers[name]
        peer.alive, peer.lives = True, peer.lives + 1
        if peer.machine.stand.epoch >= 0:
            self._digest(peer)
        self._hear(name, Started())

    def _die(self, name: str) -> None:
        peer = self._peers[name]
        if peer.alive and peer.lives == 1 and not peer.machine.left:
            self._net.after(peer.model.returns, partial(self._return, name))
        peer.alive = False

    def _return(self, name: str) -> None:
        """As after kill -9: what it was bound by, its model and the mean it voted for are left."""
        peer = self._peers[name]
        bound = state.loads(Bound, state.dumps(peer.machine.bound()))
        voted = bound.accepted[1].digest if bound.accepted is not None else ""
        peer.means = {d: m for d, m in peer.means.items() if d == voted}
        for kept in (peer.reduces, peer.inputs, peer.parts, peer.given):
            kept.clear()
        peer.machine = Rendezvous.again(name, self._size, bound, self._patience)
        peer.machine.most, peer.machine.root = self._most, START
        for other in self._peers.values():
            admitted = Admitted(other.model.name, other.model.weight, other.model.bandwidth)
            peer.machine.handle(admitted, self._net.now)
        peer.trained = ""
        self._start(name)

    # ---- a peer --------------------------------------------------------------------------------

    def _hear(self, name: str, event: PeerEvent, life: int = 0) -> None:
        """`life`: the one of the peer that this is from; 0: any."""
        peer = self._peers[name]
        if not peer.alive or life not in (0, peer.lives):
            return
        peer.handled += 1
        actions = peer.machine.handle(event, self._net.now)
        if self._listen is not None:
            self._listen(self._net.now, name, event, actions)
        if self._dies_now(peer, actions):
            # They are carried out side by side: any of them may be cut off, or all.
            done = self._net.rng.choice((0.0, 0.5))
            for action in actions:
                if self._net.rng.random() < done or isinstance(action, Apply):
                    self._do(peer, action)
            self._die(name)
            return
        for action in actions:
            self._do(peer, action)
        if isinstance(event, Heard):
            peer.heard.append(event.message)
        if isinstance(event, BeatDue):
            for attempt in sorted(peer.reduces):
                self._reduce(name, attempt, allreduce.Beat())
            if peer.model.lies:
                self._lie(peer)
        if peer.machine.left:
            self._die(name)

    def _lie(self, peer: _Peer) -> None:
        false = _sha256(self._false)
        peer.means[false] = self._false
        for other in sorted(self._peers):
            found = lies(peer.machine, other, peer.heard, false)
            kinds = sorted(kind for kind, said in found.items() if said)
            if self._decides_alone(peer.model.name):
                kinds = [kind for kind in kinds if kind not in DECISIONS]
            if other != peer.model.name:
                said = self._net.rng.choice(found[self._net.rng.choice(kinds)])
                self._do(peer, Say(other, said))

    def _decides_alone(self, name: str) -> bool:
        """Of two members the first is a quorum: what it says is what was decided. And where nobody
        else is left who has a model, newcomers know of no other."""
        machines = [p.machine for p in self._peers.values()]
        left = [m.me for m in machines if self._lives(m.me) and m.stand.epoch >= 0]
        return left == [name] or any(quorum([name], m.members, m.gone()) for m in machines)

    def _dies_now(self, peer: _Peer, actions: list[PeerAction]) -> bool:
        applies = any(isinstance(action, Apply) for action in actions)
        last = applies and peer.machine.stand.epoch == peer.model.dies_applying
        return last or peer.handled == peer.model.dies_after

    def _do(self, peer: _Peer, action: PeerAction) -> None:
        name, life = peer.model.name, peer.lives
        match action:
            case Say(to, message):
                self._send(name, to, lambda: self._hear(to, Heard(name, message)))
            case Reduce(chain, ballot, plan, deadline):
                attempt = _attempt(chain, ballot)
                peer.reduces[attempt] = AllReduce(name, plan, deadline, plan.longest(MOST))
                peer.given.add(attempt)
                self._reduce(name, attempt, allreduce.Go())
            case Drop(chain, ballot):
                peer.reduces.pop(_attempt(chain, ballot), None)
            case Get(chain, digest, holders):
                got = partial(self._got, name, chain, digest, holders, life)
                self._net.after(2 * self._net.delay(), got)
            case Apply(value):
                self._apply(peer, value.digest, value.group, value.weights)
            case Download(stand, donors, bits):
                self._download(peer, stand.chain, donors, bits)
            case Load(stand):
                chain, anchor = peer.loaded
                assert chain == stand.chain, "another model than that which is to be used"
                peer.anchor = anchor
            case TrainOn(stand):
                pace = peer.model.pace * self._net.rng.uniform(0.8, 1.2)
                if stand.chain == peer.trained:
                    self._again.add((name, stand.chain))
                peer.trained = stand.chain
                self._net.after(pace, lambda: self._hear(name, self._done(name, stand.chain), life))
            case Abort():
                self._aborts += 1
            case Wake(at):
                self._net.at(at, lambda: self._hear(name, BeatDue(), life))

    def _got(self, name: str, chain: str, digest: str, holders: tuple[str, ...], life: int) -> None:
        for holder in holders:
            if digest in self._peers[holder].means and not self._net.lost(name, holder):
                self._peers[name].means[digest] = self._peers[holder].means[digest]
                self._hear(name, MeanMade(chain, digest), life)
                return
        self._hear(name, MeanFailed(chain, "nobody has it"), life)

    def _download(self, peer: _Peer, chain: str, donors: tuple[str, ...], bits: str) -> None:
        """A donor keeps what it has begun to give."""
        name, doubted = peer.model.name, []
        event: PeerEvent = NotDownloaded(chain)
        for donor in donors:
            giver = self._peers[donor]
            if self._net.lost(name, donor):
                doubted.append(donor)
            elif giver.model.lies and bits == _sha256(self._false):
                peer.loaded, event = (chain, self._false), Downloaded(chain)
                break
            elif giver.machine.stand.chain == chain:
                anchor = [x + 1 for x in giver.anchor] if giver.model.poisons else giver.anchor
                if _sha256(anchor) == bits:
                    peer.loaded, event = (chain, list(anchor)), Downloaded(chain)
                    break
                doubted.append(donor)
        if isinstance(event, NotDownloaded):
            event = NotDownloaded(chain, tuple(doubted))
        life = peer.lives
        self._net.after(4 * self._net.delay(), lambda: self._hear(name, event, life))

    # ---- its vectors ---------------------------------------------------------------------------

    def delta(self, name: str, chain: str) -> Vector:
        """What a peer's work on a model comes to, of length 1. Its sums differ with their order."""
        model = self._peers[name].model
        if model.spoils == self._epochs.get(chain) and (name, chain) not in self._again:
            return [math.nan] * self._size
        rng = random.Random(f"{name} {chain}")
        raw = [rng.uniform(-1, 1) * 10.0 ** rng.randrange(8) for _ in range(self._size)]
        return [x / math.hypot(*raw) for x in raw]

    def _done(self, name: str, chain: str) -> StepsDone:
        return StepsDone(chain, _length(self.delta(name, chain)))

    def _apply(
        self, peer: _Peer, digest: str, group: tuple[str, ...], weights: tuple[float, ...]
    ) -> None:
        last, stand = peer.machine.last, peer.machine.stand
        self._epochs[stand.chain] = stand.epoch
        assert last is not None, "it has just been applied"
        mean = peer.means[digest]
        order = [(p, w) for p, w in zip(group, weights, strict=True) if w > 0]
        deltas = [(self.delta(p, last.base), w) for p, w in order]
        self._promises.mean(mean, _mean(deltas))
        peer.anchor = [a - m for a, m in zip(peer.anchor, mean, strict=True)]
        self._promises.applied(last.base, stand, group, weights)
        if peer.model.flips == stand.epoch:
            peer.anchor[0] += 1.0
            self._promises.flipped = True
        self._promises.holds(stand.chain, _sha256(peer.anchor))
        self._net.after(0.001, partial(self._digest, peer))
        if bandwidth := peer.meter.turn():
            for other in self._peers.values():
                told = Admitted(peer.model.name, peer.model.weight, bandwidth)
                self._net.after(self._net.delay(), partial(self._hear, other.model.name, told))
        peer.means = {digest: mean}
        peer.reduces.clear()
        for kept in (peer.inputs, peer.parts):
            for attempt in [a for a in kept if not a.startswith(last.base)]:
                del kept[attempt]

    def _digest(self, peer: _Peer) -> None:
        digested = Digested(peer.machine.stand.chain, _sha256(peer.anchor))
        self._hear(peer.model.name, digested)

    def _reduce(self, name: str, attempt: str, event: ReduceEvent) -> None:
        peer = self._peers[name]
        machine = peer.reduces.get(attempt)
        if machine is None or not peer.alive:
            return
        chain, ballot = attempt.split("/")[0], _ballot(attempt)
        for action in machine.handle(event, self._net.now):
            match action:
                case allreduce.Pull(giver, what, part):
                    pulled = partial(self._pulled, name, attempt, giver, what, part)
                    self._net.after(2 * self._net.delay(), pulled)
                case allreduce.Combine(part, order):
                    self._net.after(0.001, partial(self._combined, name, attempt, part, order))
                case allreduce.Tell(to, message):
                    self._send(name, to, partial(self._reduce, to, attempt, message))
                case allreduce.Done(digest):
                    parts = peer.parts[attempt]
                    peer.means[digest] = [x for i in sorted(parts) for x in parts[i]]
                    self._hear(name, MeanMade(chain, digest, ballot))
                case allreduce.Fail(reason, missing, spoiled):
                    failed = MeanFailed(chain, reason, ballot, missing, spoiled)
                    self._hear(name, failed)

    def _pulled(self, name: str, attempt: str, giver: str, what: allreduce.What, part: int) -> None:
        peer, other = self._peers[name], self._peers[giver]
        machine = peer.reduces.get(attempt)
        if machine is None:
            return
        result = other.parts.get(attempt, {}).get(part)
        begun = what == "result" or attempt in other.given
        if self._net.lost(name, giver) or not begun or (what == "result" and result is None):
            self._reduce(name, attempt, allreduce.Missed(giver, what, part))
            return
        if math.isinf(min(peer.model.link, other.model.link)):
            self._arrived(name, attempt, giver, what, part)
            return
        size = machine.plan.parts[part].stop - machine.plan.parts[part].start

        def arrive(began: float, ended: float) -> None:
            peer.meter.took(size, began, ended)
            other.meter.gave(size, began, ended)
            self._arrived(name, attempt, giver, what, part)

        self._links.move(giver, name, what, size, arrive)

    def _arrived(
        self, name: str, attempt: str, giver: str, what: allreduce.What, part: int
    ) -> None:
        peer, other = self._peers[name], self._peers[giver]
        machine, result = peer.reduces.get(attempt), other.parts.get(attempt, {}).get(part)
        if machine is None or (what == "result" and result is None):
            return
        digest, long = "", 0.0
        if what == "result":
            assert result is not None
            digest, long = _sha256(result), _length(result)
            peer.parts.setdefault(attempt, {})[part] = result
        else:
            place = machine.plan.parts[part]
            given = self.delta(giver, attempt.split("/")[0])[place.start : place.stop]
            peer.inputs.setdefault(attempt, {}).setdefault(part, {})[giver] = given
            self._promises.given(attempt, giver, other.lives)
        self._reduce(name, attempt, allreduce.Arrived(giver, what, part, digest, long))

    def _combined(
        self, name: str, attempt: str, part: int, order: tuple[tuple[str, float], ...]
    ) -> None:
        peer = self._peers[name]
        machine = peer.reduces.get(attempt)
        if machine is None:
            return
        place = machine.plan.parts[part]
        given = dict(peer.inputs.get(attempt, {}).get(part, {}))
        given[name] = self.delta(name, attempt.split("/")[0])[place.start : place.stop]
        self._promises.given(attempt, name, peer.lives)
        spoiled = tuple(p for p, _ in order if not all(map(math.isfinite, given[p])))
        mean = _mean([(given[p], w) for p, w in order])
        if not spoiled:
            peer.parts.setdefault(attempt, {})[part] = mean
        combined = allreduce.Combined(part, _sha256(mean), spoiled, _length(mean))
        self._reduce(name, attempt, combined)


def _mean(weighted: Sequence[tuple[Vector, float]]) -> Vector:
    """The weighted mean, summed in the order given."""
    total = sum(weight for _, weight in weighted)
    sums = [0.0] * len(weighted[0][0])
    for vector, weight in weighted:
        sums = [s + weight * x for s, x in zip(sums, vector, strict=True)]
    return [s / total for s in sums]


def _length(vector: Vector) -> float:
    """L2; 0, which says nothing, of one that is not finite."""
    found = math.hypot(*vector)
    return found if math.isfinite(found) else 0.0


def _sha256(vector: Vector) -> str:
    return hashlib.sha256(struct.pack(f"<{len(vector)}d", *vector)).hexdigest()


def _attempt(chain: str, ballot: tuple[int, str]) -> str:
    return f"{chain}/{ballot[0]}/{ballot[1]}"


def _ballot(attempt: str) -> tuple[int, str]:
    _, count, proposer = attempt.split("/")
    return int(count), proposer
