"""Your own strategy: merge every two updates, let whoever sent one train on at once.

    python own_strategy.py                          in virtual time: milliseconds
    fl-server demo --strategy own_strategy:Pairs    in real processes

`check_strategy(Pairs)` of atoll.aggregation tries it on 200 generated histories.
"""

from dataclasses import dataclass, field

from atoll.aggregation import Strategy
from atoll.aggregation.strategy import Actions
from atoll.protocols import Aggregate, ClientInfo, Finish, Merged, Train, Update
from atoll.server import simulate


@dataclass
class Pairs(Strategy):
    steps: int = 20
    versions: int = 10
    waiting: list[str] = field(default_factory=list, init=False)

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        yield Train(client, self.steps)

    def on_update(self, update: Update, now: float) -> Actions:
        self.waiting.append(update.id)
        if len(self.waiting) == 2:
            yield Aggregate(tuple((u, 0.5) for u in self.waiting))
            self.waiting.clear()
        yield Train(update.client, self.steps)

    def on_merged(self, merged: Merged, now: float) -> Actions:
        if merged.version == self.versions:
            yield Finish(f"{self.versions} versions made")


if __name__ == "__main__":
    print(simulate(Pairs(), clients={"a100": 0.05, "laptop": 0.9}))
