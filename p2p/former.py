"""Former: the model that a peer held in its former life, out of what its disk remembers."""

import contextlib
from dataclasses import dataclass

from atoll.aggregation.rendezvous_events import Bound
from atoll.aggregation.rendezvous_messages import Stand
from atoll.aggregation.sync_engine import SyncEngine, SyncState
from atoll.p2p.exchange import Exchange
from atoll.p2p.memory import Memory
from atoll.protocols.codecs import Codec


@dataclass(frozen=True)
class Former:
    memory: Memory
    exchange: Exchange
    engine: SyncEngine
    codec: Codec

    def model(self, bound: Bound, start: Stand) -> SyncState | None:
        """The model of `bound`, and its means in the exchange. None where it is not whole."""
        engine, last = self.engine, bound.last
        for value in [v for v in (last and last.value, bound.accepted and bound.accepted[1]) if v]:
            mean = self.memory.mean(value.digest, self.codec)
            if mean is not None:
                self.exchange.keep(mean)
            elif last is None or value != last.value:
                return None  # it voted for what it does not hold any more
        if last is None:
            return engine.state
        found = self.memory.model(bound.stand.chain)
        if found is not None:
            return found
        first = last.base == start.chain
        before = engine.state if first else self.memory.model(last.base)
        if before is None or last.value.digest not in self.exchange:
            return None
        engine.load(before)
        with contextlib.suppress(ValueError):
            engine.commit(self.exchange.mean(last.value.digest).values)
        return engine.state
