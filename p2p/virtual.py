"""A swarm in virtual time: the peers' machines, a network that fails, small vectors, and no forks.

    print(Swarm([PeerModel("a"), PeerModel("b", dies=3.0)], Weather(loss=0.1), seed=7).run(5))

It drives `rendezvous.py` as a real transport would, and `allreduce.py` in `virtual_reduce.py`, and
checks at every commit what a swarm promises (`promises.py`). The same seed gives the same run.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

from atoll.aggregation.circle import Patience
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
    NotDownloaded,
    PeerAction,
    PeerEvent,
    Reduce,
    Say,
    Started,
    StepsDone,
    TrainOn,
    Wake,
)
from atoll.aggregation.rendezvous_messages import Stand
from atoll.aggregation.shares import PIECE
from atoll.p2p import vectors
from atoll.p2p.lies import DECISIONS, lies
from atoll.p2p.outcome import Outcome, behind, headless, short
from atoll.p2p.promises import Promises
from atoll.p2p.simulated import Simulated
from atoll.p2p.vectors import Vector
from atoll.p2p.virtual_reduce import Reduces
from atoll.p2p.world import Network, PeerModel, Weather
from atoll.protocols import state

Listen = Callable[[float, str, PeerEvent, list[PeerAction]], None]

START = Stand(0, "start", 0.0)


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
        self._epochs = {START.chain: 0}
        self._again: set[tuple[str, str]] = set()  # (peer, chain): work that was done twice
        self._false = [-0.5] * size  # a mean and a model, of a liar
        self._promises, self._aborts = Promises(), 0
        self._patience = patience or Patience()
        self._most = max(p.weight for p in peers)
        founders = tuple(sorted(p.name for p in peers if p.joins == 0))
        self._peers: dict[str, Simulated] = {}
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
            self._peers[model.name] = Simulated(model, machine, [0.0] * size)
            self._net.at(model.joins, partial(self._start, model.name))
            self._net.at(model.dies, partial(self._die, model.name))
            self._net.at(model.leaves, partial(self._hear, model.name, Leaving()))
        self._reduces = Reduces(
            self._net, self._peers, self._promises, hear=self._hear, delta=self.delta
        )

    def run(self, epochs: int, until: float = 300.0) -> Outcome:
        """Until all who live have made so many epochs, or `until` seconds have passed."""
        peers = self._peers
        while self._net.next_before(until):
            now = self._net.now  # who is behind is cheaper to see than who has other bits
            if now > 0 and not behind(peers, epochs, now) and not short(peers, epochs, now):
                break
        late, excused = short(peers, epochs, self._net.now), headless(peers)
        living = [p.machine.stand.epoch for p in peers.values() if p.alive]
        kept = self._promises
        return Outcome(
            self._net.now, min(living, default=0), kept.forks, kept.wrong,
            () if excused else tuple(late), excused and bool(late), self._aborts, kept.commits,
        )  # fmt: skip

    def _lives(self, name: str) -> bool:
        return self._peers[name].alive

    # ---- lives -------------------------------------------------------------------------------

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
        self._reduces.forget(name)
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
        if peer.dies_now(actions):
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
            self._reduces.beat(name)
            if peer.model.lies:
                self._lie(peer)
        if peer.machine.left:
            self._die(name)

    def _lie(self, peer: Simulated) -> None:
        false = vectors.sha256(self._false)
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
        else is left who takes part, newcomers know of no other."""
        machines = [p.machine for p in self._peers.values()]
        left = [m.me for m in machines if self._lives(m.me) and _takes_part(m)]
        return left == [name] or any(quorum([name], m.members, m.gone()) for m in machines)

    def _do(self, peer: Simulated, action: PeerAction) -> None:
        name, life = peer.model.name, peer.lives
        match action:
            case Say(to, message):
                told = partial(self._hear, to, Heard(name, message))
                self._net.send(name, to, told, partial(self._hear, name, Lost(to)))
            case Reduce(chain, ballot, plan, deadline):
                self._reduces.begin(name, chain, ballot, plan, deadline)
            case Drop(chain, ballot):
                self._reduces.drop(name, chain, ballot)
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

    def _download(self, peer: Simulated, chain: str, donors: tuple[str, ...], bits: str) -> None:
        """A donor keeps what it has begun to give."""
        name, doubted = peer.model.name, []
        event: PeerEvent = NotDownloaded(chain)
        for donor in donors:
            giver = self._peers[donor]
            if self._net.lost(name, donor):
                doubted.append(donor)
            elif giver.model.lies and bits == vectors.sha256(self._false):
                peer.loaded, event = (chain, self._false), Downloaded(chain)
                break
            elif giver.machine.stand.chain == chain:
                anchor = [x + 1 for x in giver.anchor] if giver.model.poisons else giver.anchor
                if vectors.sha256(anchor) == bits:
                    peer.loaded, event = (chain, list(anchor)), Downloaded(chain)
                    break
                doubted.append(donor)
        if isinstance(event, NotDownloaded):
            event = NotDownloaded(chain, tuple(doubted))
        life = peer.lives
        self._net.after(4 * self._net.delay(), lambda: self._hear(name, event, life))

    # ---- its vectors ---------------------------------------------------------------------------

    def delta(self, name: str, chain: str) -> Vector:
        """What a peer's work on a model comes to, of length 1."""
        model = self._peers[name].model
        if model.spoils == self._epochs.get(chain) and (name, chain) not in self._again:
            return [math.nan] * self._size
        return vectors.unit(f"{name} {chain}", self._size)

    def _done(self, name: str, chain: str) -> StepsDone:
        return StepsDone(chain, vectors.length(self.delta(name, chain)))

    def _apply(
        self, peer: Simulated, digest: str, group: tuple[str, ...], weights: tuple[float, ...]
    ) -> None:
        last, stand = peer.machine.last, peer.machine.stand
        self._epochs[stand.chain] = stand.epoch
        assert last is not None, "it has just been applied"
        mean = peer.means[digest]
        order = [(p, w) for p, w in zip(group, weights, strict=True) if w > 0]
        deltas = [(self.delta(p, last.base), w) for p, w in order]
        self._promises.mean(mean, vectors.mean(deltas))
        peer.anchor = [a - m for a, m in zip(peer.anchor, mean, strict=True)]
        self._promises.applied(last.base, stand, group, weights)
        if peer.model.flips == stand.epoch:
            peer.anchor[0] += 1.0
            self._promises.flipped = True
        self._promises.holds(stand.chain, vectors.sha256(peer.anchor))
        self._net.after(0.001, partial(self._digest, peer))
        if bandwidth := peer.meter.turn():
            for other in self._peers.values():
                told = Admitted(peer.model.name, peer.model.weight, bandwidth)
                self._net.after(self._net.delay(), partial(self._hear, other.model.name, told))
        recent = {step.last.value.digest for step in peer.machine.recent}
        peer.means = {d: m for d, m in peer.means.items() if d in {digest, *recent}}
        self._reduces.turn(peer.model.name, last.base)

    def _digest(self, peer: Simulated) -> None:
        digested = Digested(peer.machine.stand.chain, vectors.sha256(peer.anchor))
        self._hear(peer.model.name, digested)


def _takes_part(machine: Rendezvous) -> bool:
    """Who has only loaded the first model has had no part in the run: it is a newcomer still."""
    stand = machine.stand
    return stand.epoch > 0 or (stand.epoch == 0 and machine.me in machine.members)
