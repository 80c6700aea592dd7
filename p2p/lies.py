"""Lies: what a member says that wants to harm the others, for storms and for real processes.

It claims a weight beyond all bounds, proposes what may not be proposed and in another's name, says
what is long over, and repeats what it has heard. It gives out a mean and a model of its own as what
the run has decided, now and long ago, in its own name and in others'. It does its own work besides.
"""

from collections.abc import Sequence
from dataclasses import replace

from atoll.aggregation.allreduce import Part, Plan
from atoll.aggregation.rendezvous import Rendezvous
from atoll.aggregation.rendezvous_messages import (
    Accept,
    Announce,
    Begin,
    Commit,
    Goodbye,
    Message,
    Path,
    Prepare,
    Promise,
    Refuse,
    Stand,
    Step,
    Value,
    Whence,
)
from atoll.aggregation.seals import made

HEAVY = 1e9
ENDLESS = 1 << 52  # nobody could count beyond it
NONE = "f" * 64  # no digest
DECISIONS = ("commit", "far")  # kinds that claim what a quorum decides


def lies(
    machine: Rendezvous, to: str, heard: Sequence[Message] = (), false: str = NONE
) -> dict[str, list[Message]]:
    """Kind -> what a peer of this machine may say to the member `to`; `heard`: from others.

    `false`: the digest of a mean, and of a model, that it serves to whoever asks.
    """
    me, chain, size = machine.me, machine.stand.chain, machine.size
    group = tuple(sorted((me, to)))
    weights = tuple(HEAVY if peer == me else 1.0 for peer in group)
    mine = machine.promised[0] + 1, me
    value = Value(mine, group, weights, NONE)
    torn = (Part(me, 0, size // 2),)
    asked = [m for m in heard if isinstance(m, Prepare)][-1:]
    ours = _sealed(machine, machine.stand, group, false)
    made_up = ours, _sealed(machine, machine.stand, (me,), false)
    between = machine.stand.next(ours)
    after = Commit(between.chain, _sealed(machine, between, (me,), false))
    steps = Step(between, Commit(chain, ours)), Step(between.next(after.value), after)
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
        "commit": [
            *(Commit(chain, value) for value in made_up),
            *(Accept(chain, mine, value, group) for value in made_up),
            *(
                Announce(machine.stand.next(value), True, Commit(chain, value), false)
                for value in made_up
            ),
            *(Promise(p.chain, p.ballot, True, (mine, value)) for p in asked for value in made_up),
        ],
        "far": [
            Announce(steps[-1].stand, True, after, false),
            Path(steps),
            Whence(-HEAVY),
        ],
        "goodbye": [Goodbye(machine.stand, (mine, ours), machine.seals.seal("left"))],
        "stale": [Prepare("0" * 32, mine), Announce(Stand(), True, None)],
        # A goodbye repeated is its own: it may leave whenever it likes.
        "replay": [message for message in heard if not isinstance(message, Goodbye)],
    }


def _sealed(machine: Rendezvous, stand: Stand, group: tuple[str, ...], false: str) -> Value:
    """A mean that leads on from `stand`, by weights that may be, sealed in the names of all."""
    value = Value((1, machine.me), group, (machine.most,) * len(group), false)
    seal = machine.seals.seal(made(stand.next(value)))
    return replace(value, seals=tuple((peer, seal) for peer in group))
