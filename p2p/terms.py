"""Terms: what all peers of a run agree on, of its manifest."""

import logging
from dataclasses import dataclass

from atoll.aggregation.circle import Patience
from atoll.aggregation.rendezvous_messages import Stand
from atoll.protocols.codecspec import Ways
from atoll.protocols.errors import PeerError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Terms:
    run: str  # hash of the manifest: the first model's chain begins with it
    init: str  # SHA-256, in hex, of the first model
    founder: str  # peer id of who decides the first commit
    rounds: int  # 0: no end
    ways: Ways
    patience: Patience
    most: float  # medians of length that a peer's part may have
    share: float  # weight of a whole share of the work

    @property
    def start(self) -> Stand:
        return Stand(0, self.run[:32], 0.0)

    def first(self, me: str, here: str) -> Stand:
        """Where `me` begins that comes for the first time and made the first model `here`.

        Another than the run's, as another version of torch may make, is downloaded; PeerError
        FL-P408 where that is the founder, whom the others take theirs from.
        """
        if here == self.init:
            return self.start
        if me == self.founder:
            raise PeerError(
                "FL-P408",
                f"the first model here is {here[:12]}, the run was founded with {self.init[:12]}",
                "take the versions of torch and of the model that it was founded with",
            )
        logger.warning(
            "peer=%s the first model here is %s, the run's is %s: that will be downloaded",
            me, here[:12], self.init[:12],
        )  # fmt: skip
        return Stand()
