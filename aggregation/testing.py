"""Try a part, yours or ours, on cases made from seeds, without a network.

`check_strategy(lambda: MyStrategy(...))` runs hundreds of histories - clients of different and
changing speed, deaths, returns, ties in any order, late results, results that are NaN, timers that
should not fire, a restart from the dumped state before every event - and raises AssertionError with
the seed for what a strategy must not do. `check_aggregator` does the same with
merges, `check_codec` with vectors and hostile bytes.
"""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from atoll.aggregation.strategy import Strategy
from atoll.aggregation.virtual import Restart, Virtual
from atoll.protocols import state
from atoll.protocols.errors import RAISED

if TYPE_CHECKING:
    from atoll.aggregation.aggregator import Aggregator
    from atoll.protocols.codecs import Codec

Make = Callable[[], Strategy]


def check_strategy(
    make: Make, seeds: int = 200, events: int = 60, steps: tuple[int, int] = (1, 1 << 30)
) -> None:
    """Run `make()` through `seeds` histories of at most `events` events.

    Holds it to: orders only to clients that are present and have none open, with steps within
    `steps`; every update used or discarded once, or still held in its state, also when a merge
    drops it for a NaN and when the run is stopped; finite weights; wrong timers change nothing; the
    same history gives the same log; a strategy dumped and loaded before every event gives that log
    too; all of it in whatever order that comes which happens at one instant.
    """
    for seed in range(seeds):
        try:
            plain = lived(make, seed, steps, events)
            again = lived(make, seed, steps, events, restart=restart)
            assert plain.log == again.log, "a restart before every event changes its decisions"
            for run in (plain, lived(make, seed, steps, events, shuffled=seed)):
                held = state.dumps(run.strategy)
                for update in sorted(run.updates):
                    assert f'"{update}"' in held, f"{update} is neither used, discarded nor held"
        except RAISED as error:
            why = error if isinstance(error, AssertionError) else f"it raises {error!r}"
            raise AssertionError(f"seed {seed}: {why}") from error


def lived(
    make: Make,
    seed: int,
    steps: tuple[int, int],
    events: int,
    restart: Restart | None = None,
    shuffled: int | None = None,
) -> Virtual:
    """A history from its first event to its stop."""
    run = history(make, seed, steps)
    run.restart, run.shuffled = restart, shuffled
    return run.run(events=events).stop()


def check_aggregator(make: "Callable[[], Aggregator]", cases: int = 200) -> None:
    """The same for a rule, on generated merges: see `atoll.aggregation.testing_rules`."""
    from atoll.aggregation import testing_rules  # needs torch, which strategies do without

    testing_rules.check_aggregator(make, cases)


def check_codec(make: "Callable[[], Codec]", cases: int = 200, error: float = 1.01) -> None:
    """The same for a codec, on generated values and on bytes that nobody encoded: see
    `atoll.aggregation.testing_codecs`.
    """
    from atoll.aggregation import testing_codecs

    testing_codecs.check_codec(make, cases, error)


def restart(strategy: Strategy) -> Strategy:
    """The strategy as it comes back from its dump."""
    return state.loads(type(strategy), state.dumps(strategy))


def history(make: Make, seed: int, steps: tuple[int, int] = (1, 1 << 30)) -> Virtual:
    """A scenario made from `seed`, ready to run. Times lie on a grid, so that ties are common."""
    rng = random.Random(f"history/{seed}")
    clients = [f"c{i}" for i in range(rng.randint(1, 7))]
    grid = rng.choice([0.25, 0.5, 1.0])
    base = {c: grid * rng.randint(1, 8) for c in clients}
    noise = rng.choice([0.0, 0.05, 0.5])

    def pace(client: str, order: int) -> float:
        drawn = random.Random(f"{seed}/{client}/{order}")
        change = 4.0 if drawn.random() < noise / 4 else 1.0
        return base[client] * change * max(0.1, drawn.gauss(1.0, noise)) if noise else base[client]

    run = Virtual(make(), pace, merging=rng.choice([0.0, 0.0, grid * 3]), steps=steps)
    often = random.Random(f"bad/{seed}").choice([0.0, 0.0, 0.2, 1.0])
    run.bad = lambda update: random.Random(f"bad/{seed}/{update}").random() < often
    for client in clients:
        at = grid * rng.choice([0, 0, rng.randint(0, 400)])
        run.join(at, client, rng.randint(0, 9), rng.choice([None, None, base[client]]))
        while rng.random() < 0.5:
            at += grid * rng.randint(0, 300)
            brings = rng.choice([None, at + grid * rng.randint(0, 300)])
            run.leave(at, client, brings)
            if rng.random() < 0.8:
                at += grid * rng.randint(0, 300)
                run.join(at, client, rng.randint(1, 9))
            else:
                break
    for _ in range(rng.randint(0, 5)):
        name = rng.choice(
            ["g0", "g1", "g1 silent", "round-1", "round-2", "buffer", "no such timer"]
        )
        run.fire(grid * rng.randint(0, 800), name)
    return run
