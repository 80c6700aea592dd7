"""Trainers: who trains in a simulated run, as specs that another process can follow, too."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from atoll.client.data import Data, Examples, Indices, load_data
from atoll.client.heldout import SHARE, cut
from atoll.client.local import LocalConfig
from atoll.client.options import own_trainer
from atoll.client.partition import shards_of
from atoll.client.proxy import held_out
from atoll.client.specs import trainer_on
from atoll.client.trainer import Trainer
from atoll.protocols.errors import UsageError
from atoll.server.attack import Attack

VALIDATORS = "validators"  # in place of proxy data: what the clients themselves hold out


@dataclass(frozen=True)
class Trainers:
    """Each client has the shard of its place in the list; `make` gives it its trainer.

    With `own`, a `module:object`, that makes each client's and the rest does not count.
    """

    clients: Sequence[str]
    model: str = "mlp"
    data: str | Data = "digits"
    partition: str | Sequence[Indices] = "iid"  # or the rows of each client
    seed: int = 0
    local: LocalConfig = LocalConfig()  # noqa: RUF009  frozen
    algorithm: str = "plain"
    attacks: Mapping[str, str] = field(default_factory=dict)  # of hostile clients
    own: str = ""
    proxy: str = ""  # what is held out of `data` for the server, or VALIDATORS
    given: Data | None = field(default=None, compare=False, repr=False)  # `data`, if it is loaded

    @cached_property
    def loaded(self) -> Data:
        if self.given is not None:
            return self.given
        if not isinstance(self.data, str):
            return self.data
        whole = load_data(self.data)
        if self.proxy in ("", VALIDATORS):
            return whole
        return held_out(self.proxy, self.data, whole, self.seed)

    @cached_property
    def parts(self) -> Mapping[str, Indices]:
        """Each client's rows of the training examples."""
        return {name: rest for name, (rest, _) in self._cut.items()}

    @cached_property
    def _cut(self) -> Mapping[str, tuple[Indices, Indices]]:
        """What each trains on, and what it holds out to judge models in a merge."""
        parts = self.partition
        if isinstance(parts, str):
            parts = shards_of(self.loaded, parts, len(self.clients), self.seed)
        share = SHARE if self.proxy == VALIDATORS else 0.0
        both = zip(self.clients, parts, strict=True)
        return {name: cut(rows, share, self.seed, name) for name, rows in both}

    @cached_property
    def hostile(self) -> Mapping[str, Attack]:
        return {name: Attack.parse(spec) for name, spec in self.attacks.items()}

    @cached_property
    def _seen(self) -> Mapping[str, Data]:
        return {name: attack.on_data(self.loaded) for name, attack in self.hostile.items()}

    def make(self, name: str) -> Trainer:
        if self.own:
            place = (list(self.clients).index(name), len(self.clients))
            return own_trainer(self.own, name, place, self.seed)
        mine = self._seen.get(name, self.loaded).shard(self.parts[name])
        return trainer_on(
            mine, self.loaded, self.model, self.seed, self.local, self.algorithm, name
        )

    def held(self, name: str) -> Examples:
        """What a client holds out, as it sees it."""
        return self._seen.get(name, self.loaded).shard(self._cut[name][1])

    def judge(self) -> Trainer:
        """One that trains on nothing, and evaluates."""
        if self.own:
            return own_trainer(self.own, "server", seed=self.seed)
        data = self.loaded
        some = data.train if data.test is None else data.test
        return trainer_on(some, data, self.model, self.seed, self.local, client="server")

    def dumps(self) -> str:
        """As JSON. UsageError FL-S104 where something is no spec but an object of this process."""
        if not isinstance(self.data, str) or not isinstance(self.partition, str):
            raise UsageError(
                "FL-S104", "several processes, but the data or its parts are objects of this one",
                "name them, e.g. data='mnist:DIR', partition='dirichlet:0.5', or use one process",
            )  # fmt: skip
        whole: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        told = {"clients": list(self.clients), "local": asdict(self.local)}
        return json.dumps(whole | told | {"attacks": dict(self.attacks)})

    @classmethod
    def loads(cls, text: str) -> "Trainers":
        told = json.loads(text)
        return cls(**(told | {"local": LocalConfig(**told["local"])}))
