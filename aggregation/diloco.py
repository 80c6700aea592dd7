"""DiLoCo: FedAvg's rounds for few well-equipped clients with many local steps between two merges.

Douillard et al. 2023, https://arxiv.org/abs/2311.08105. The method is a mix: these rounds, outer
Nesterov (0.7, 0.9) and clients that keep their AdamW from round to round, which `--strategy diloco`
sets where nothing else is said (`atoll.server.presets`). Peers do the same without a server, by
`sync_engine.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

from atoll.aggregation import dylu
from atoll.aggregation.checks import at_least
from atoll.aggregation.fedavg import FedAvg
from atoll.aggregation.strategy import Actions
from atoll.protocols.events import ClientInfo, Train, Update

NEWEST = 0.3  # share of the newest measurement in a client's speed


@dataclass
class DiLoCo(FedAvg):
    """FedAvg whose weights are the examples that a round was trained on, and with `dylu` each
    client's steps follow its measured speed: the fastest runs `steps`, no one fewer than
    `min_steps` (Liu et al. 2024). All else is FedAvg's.

    Each order names the step of the run at which it starts, for a schedule of the local step size:
    all clients are at one place of it, whenever they came.
    """

    weighting: Literal["examples", "seen", "equal"] = "seen"
    dylu: bool = True  # local steps by speed; False: `steps` for all
    min_steps: int = 5  # of the slowest

    speeds: dict[str, float] = field(default_factory=dict, init=False)  # steps a second

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, min_steps=self.min_steps)

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        if info.seconds_per_step:
            self.speeds[client] = 1 / info.seconds_per_step
        yield from super().on_join(client, info, now)

    def on_update(self, update: Update, now: float) -> Actions:
        if update.steps and update.train_seconds > 0:
            new = update.steps / update.train_seconds
            old = self.speeds.get(update.client, new)
            self.speeds[update.client] = old + NEWEST * (new - old)
        yield from super().on_update(update, now)

    def order(self, client: str) -> Train:
        return Train(client, self.steps_of(client), {"run_step": float(self.merges * self.steps)})

    def steps_of(self, client: str) -> int:
        """This round's local steps of a client; all of them where its speed is not known."""
        known = [self.speeds[c] for c in sorted(self.present) if c in self.speeds]
        if not self.dylu or client not in self.speeds:
            return self.steps
        share = dylu.share(self.speeds[client], max(known))
        return dylu.local_steps(self.steps, share, self.min_steps)
