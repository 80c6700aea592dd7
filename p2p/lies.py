"""Lies: what a member says that wants to harm the others, for storms and for real processes.

It claims a weight beyond all bounds, proposes what may not be proposed and in another's name, says
what is long over, and repeats what it has heard. It does its own work besides.
"""

from collections.abc import Sequence

from atoll.aggregation.allreduce import Part, Plan
from atoll.aggregation.rendezvous import Rendezvous
from atoll.aggregation.rendezvous_events import (
    Accept,
    Announce,
    Begin,
    Commit,
    Goodbye,
    Message,
    Prepare,
    Promise,
    Refuse,
    Stand,
    Value,
)

HEAVY = 1e9
ENDLESS = 1 << 52  # nobody could count beyond it
NONE = "f" * 64  # no digest


def lies(machine: Rendezvous, to: str, heard: Sequence[Message] = ()) -> dict[str, list[Message]]:
    """Kind -> what a peer of this machine may say to the member `to`; `heard`: from others."""
    me, chain, size = machine.me, machine.stand.chain, machine.size
    group = tuple(sorted((me, to)))
    weights = tuple(HEAVY if peer == me else 1.0 for peer in group)
    mine = machine.promised[0] + 1, me
    value = Value(mine, group, weights, NONE)
    torn = (Part(me, 0, size // 2),)
    asked = [m for m in heard if isinstance(m, Prepare)][-1:]
    return {
        "weight": [
            Begin(chain, mine, Plan(group, weights, (Part(me, 0, size),))),
            Accept(chain, mine, value, group),
            Commit(chain, value),
            Announce(machine.stand.next(value), True, Commit(chain, value), NONE),
            Announce(Stand(0, NONE[:32], HEAVY), True, None, NONE),
            *(Promise(p.chain, p.ballot, True, (mine, value)) for p in asked),
        ],
        "shape": [Begin(chain, mine, Plan(group, (1.0, 1.0), torn))],
        "ballot": [
            Prepare(chain, (ENDLESS, me)),
            Refuse(chain, (ENDLESS, me)),
            Prepare(chain, (mine[0], to)),
        ],
        "stale": [Prepare("0" * 32, mine), Announce(Stand(), True, None)],
        # A goodbye repeated is its own: it may leave whenever it likes.
        "replay": [message for message in heard if not isinstance(message, Goodbye)],
    }
