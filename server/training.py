"""Training: real local training for a simulated run. The server's own merger, all in memory.

    with_data = Training.of(["fast", "slow"], model="mlp", data="digits", partition="iid")
    print(simulate(FedAvg(steps=20), {"fast": 0.1, "slow": 0.4}, learning=with_data, until=100))

A client trains when its result arrives, so work that is lost is never done. The numbers are those
of a real run: same trainer, same batches, same bytes, same merge.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor

from atoll.aggregation.aggregator import Aggregator, aggregator
from atoll.aggregation.half import Numbers, extras_of, generation, told, told_to
from atoll.aggregation.outer import Outer, outer
from atoll.aggregation.strategy import Strategy
from atoll.client import contract
from atoll.client.algorithm import LocalAlgorithm, local_algorithm
from atoll.client.data import Data, Indices, load_data
from atoll.client.local import LocalConfig, TorchTrainer
from atoll.client.localdp import LocalDP
from atoll.client.localdp import local_dp as own_noise
from atoll.client.models import build, manifest_of, named_tensors
from atoll.client.trainer import Trainer
from atoll.protocols import tensors
from atoll.protocols.codecs import FP32
from atoll.protocols.events import Merged
from atoll.protocols.manifest import TRAVELLING, Manifest
from atoll.protocols.payload import Payload
from atoll.server.accountant import Sampling
from atoll.server.attack import Attack
from atoll.server.buffers import Buffers
from atoll.server.check import check_simulated
from atoll.server.combine import MEAN
from atoll.server.crew import Crew, Job, Together
from atoll.server.dp import central_dp
from atoll.server.items import UpdateBytes
from atoll.server.learner import learning, learning_in, validated
from atoll.server.learning import Worked
from atoll.server.merge import PLAIN, Merger
from atoll.server.momenta import suited
from atoll.server.privacy import Privacy
from atoll.server.run import FORMER, Fate, Merge, Order
from atoll.server.simasker import SimAsker, asking_in
from atoll.server.simkeeps import SimKeeps
from atoll.server.simlinks import SimLinks
from atoll.server.simnoise import SimNoise, simulated_key
from atoll.server.spec import RunSpec
from atoll.server.table import table_of
from atoll.server.trainers import VALIDATORS, Trainers
from atoll.server.versions import VersionStore

Factory = Callable[[str], Trainer]  # of a client's name
Engine = Callable[[Trainers], Crew]


class Training:
    """A `Learning` with one trainer per client, made when it is first needed, by a crew.

    `judge` evaluates versions; None: no evaluation. An order whose client was asked for a snapshot
    is trained again from its start when it is finished, so a trainer that keeps its optimizer's
    state between orders must not be asked for one.
    """

    def __init__(
        self,
        factory: Factory,
        manifest: Manifest,
        initial: Mapping[str, Tensor],
        *,
        judge: Trainer | None = None,
        examples: Mapping[str, int] | None = None,
        aggregator: Aggregator = MEAN,
        outer: Outer = PLAIN,
        buffers: Buffers = "weighted_mean",
        crew: Crew | None = None,
        attacks: Mapping[str, Attack] | None = None,
        privacy: Privacy | None = None,
        local_dp: LocalDP | None = None,
        algorithm: LocalAlgorithm | None = None,
        seed: int = 0,
        up: str = "fp32",
        down: str = "fp32",
        codecs: Mapping[str, str] | None = None,
        spec: RunSpec | None = None,
        asked: SimAsker | None = None,
    ) -> None:
        """`up`, `down`: codecs that the run allows, the best first; `codecs`: what single clients
        ask for. `algorithm`: the trainers', for its half on the server and the state of the
        clients, who have their names and `seed` for their states' lives. `spec`: what the parts are
        called, to judge whether they go together; None: the parts themselves say. `asked`: puts the
        aggregator's questions to the clients."""
        half = algorithm.server_half() if algorithm is not None else None
        self.manifest = manifest
        self._spec = spec or RunSpec("", codec_up=up, codec_down=down)
        self._parts: dict[str, object] = {"model": None, "data": None}  # they are there
        if spec is None:
            self._parts |= {"aggregator": aggregator, "outer": outer}
        if spec is None and algorithm is not None:
            self._parts["local algorithm"] = algorithm
        self._crew, self._judge = crew or Together(factory), judge
        self._examples, self._attacks = examples or {}, attacks or {}
        self._asked = asked
        self._noise = SimNoise(local_dp, seed) if local_dp is not None else None
        self._count = manifest.counts["trainable"]
        self._table = table_of(half, self._count, None)
        self._merger = Merger(
            manifest, aggregator, outer, buffers, 1, privacy=privacy, half=half, table=self._table
        )
        self._extras = extras_of(half, self._count)
        self._rules = algorithm.rules if algorithm is not None else {}
        self._says = half.says if half is not None else ()
        with tempfile.TemporaryDirectory() as folder:  # never used: every version is a small one
            self._versions = VersionStore(Path(folder), manifest, memory_limit=1 << 62)
        self._newest = self._versions.initial(initial)
        self._links = SimLinks(self._versions, up, down, codecs or {})
        self.keeps = SimKeeps(self._links, self._rules, seed)
        self._done: dict[str, int] = {}  # client -> local steps in its life
        self._orders: dict[str, dict[str, int]] = {}  # client -> order -> version, may be trained
        self._held: dict[str, UpdateBytes] = {}

    @classmethod
    def of(
        cls,
        clients: Sequence[str],
        *,
        model: str = "mlp",
        data: str | Data = "digits",
        partition: str | Sequence[Indices] = "iid",
        seed: int = 0,
        local: LocalConfig = LocalConfig(),  # noqa: B008  frozen
        algorithm: str = "plain",
        aggregation: str = "mean",
        step: str = "sgd",
        up: str = "fp32",
        down: str = "fp32",
        codecs: Mapping[str, str] | None = None,
        buffers: str = "weighted_mean",
        proxy: str | Data = "",
        attacks: Mapping[str, str] | None = None,
        dp: str = "",
        sampling: Sampling | None = None,
        local_dp: str = "",
        engine: Engine | None = None,
    ) -> Self:
        """From the specs of a command line; each client has the shard of its place in the list.

        `partition` may be the shards themselves: the rows of each client. What is taken as `proxy`
        data is held out of the clients' where both are the same data. `attacks` are those of
        hostile clients, by name (`atoll.server.attack`), `codecs` what single clients ask for of
        those that `up` and `down` allow ("topk:0.01+ef/int8", the best first). `engine` makes the
        crew; None: all train in this process. `close` it then.
        """
        whole = load_data(data) if isinstance(data, str) else data
        rule, left = learning_in(
            aggregator(aggregation), lambda: build(model, whole.info, seed), whole,
            data if isinstance(data, str) else "", proxy, seed, aggregation,
        )  # fmt: skip
        kept_back = VALIDATORS if validated(rule) else proxy if isinstance(proxy, str) else ""
        trainers = Trainers(
            clients, model, data if isinstance(data, str) else left, partition, seed, local,
            algorithm, attacks or {}, proxy=kept_back, given=left,
        )  # fmt: skip
        judge = trainers.judge()
        assert isinstance(judge, TorchTrainer)
        rule, asked = asking_in(rule, judge.manifest, lambda asks: SimAsker.of(asks, trainers))
        return cls(
            trainers.make, judge.manifest, judge.export(),
            judge=judge if left.test is not None else None,
            examples={name: len(rows) for name, rows in trainers.parts.items()},
            aggregator=rule, outer=outer(suited(step, algorithm)),
            buffers=cast("Buffers", buffers), up=up, down=down, codecs=codecs,
            attacks=trainers.hostile,
            privacy=Privacy(central_dp(dp), simulated_key(seed), sampling) if dp else None,
            local_dp=own_noise(local_dp) if local_dp else None, asked=asked, seed=seed,
            crew=engine(trainers) if engine else None, algorithm=local_algorithm(algorithm),
            spec=RunSpec(
                "", aggregator=aggregation, outer=step, algorithm=algorithm, codec_up=up,
                codec_down=down, dp=dp, local_dp=local_dp, proxy=_named(proxy),
                local={"optimizer": local.optimizer, "momentum": local.momentum},
            ),
        )  # fmt: skip

    @classmethod
    def own(
        cls,
        trainer: str,  # module:object
        clients: Sequence[str],
        *,
        model: str,
        data: str,
        seed: int,
        aggregation: str = "mean",
        step: str = "sgd",
        up: str = "fp32",
        down: str = "fp32",
        codecs: Mapping[str, str] | None = None,
        buffers: str = "weighted_mean",
        dp: str = "",
        sampling: Sampling | None = None,
        local_dp: str = "",
        proxy: str = "",
        engine: Engine | None = None,
    ) -> Self:
        """Every client a trainer of the user's; the model says which tensors there are, the data
        what shape it has."""
        loaded = load_data(data) if data else None
        module = build(model, loaded.info if loaded else None, seed)
        rule = learning(aggregator(aggregation), module, proxy, loaded, seed, aggregation)
        trainers = Trainers(clients, seed=seed, own=trainer)
        made = {name: trainers.make(name) for name in clients}
        judges = {name: getattr(t, "validator", None) for name, t in made.items()}
        rule, asked = asking_in(rule, manifest_of(module), lambda asks: SimAsker(asks, judges))
        initial = {name: tensor.detach() for name, tensor in named_tensors(module)}
        return cls(
            made.__getitem__, manifest_of(module), initial, judge=trainers.judge(),
            examples={name: contract.examples(t) for name, t in made.items()},
            aggregator=rule, outer=outer(step),
            buffers=cast("Buffers", buffers), up=up, down=down, codecs=codecs,
            privacy=Privacy(central_dp(dp), simulated_key(seed), sampling) if dp else None,
            local_dp=own_noise(local_dp) if local_dp else None, seed=seed,
            crew=engine(trainers) if engine else None, asked=asked,
            spec=RunSpec(
                "", aggregator=aggregation, outer=step, codec_up=up, codec_down=down, dp=dp,
                local_dp=local_dp, proxy=proxy,
            ),
        )  # fmt: skip

    # ---- as the simulator asks -----------------------------------------------------------------

    def check(self, strategy: Strategy, clients: int) -> list[str]:
        return check_simulated(self._spec, self._parts, strategy, clients)

    def examples(self, client: str) -> int | None:
        return self._examples.get(client)

    def given(self, order: Order) -> None:
        if self._asked is not None:
            self._asked.came(order.client)
        orders = self._orders.setdefault(order.client, {})
        orders[order.id] = order.version
        self.keeps.begin(order.id, order.client)
        while len(orders) > FORMER + 1:  # the run has forgotten older ones
            gone = next(iter(orders))
            del orders[gone]
            self.keeps.end(gone)
            self._drop(gone)

    def download(self, order: Order) -> int | None:
        return self._links.size(order) + self._beside(order)

    def sent(self, order: Order) -> int | None:
        size, anew = self._links.send(order, self._newest.number)
        if anew:
            self._crew.forget(order.id)
            self._crew.begin(self._job(order, order.steps), partial(self._start, order))
        return size + self._beside(order)

    def died(self, client: str) -> None:
        self._links.died(client)
        if self._asked is not None:
            self._asked.left(client)

    @property
    def _extra_bytes(self) -> int:
        """What goes down beside a model."""
        return sum(s.length for s in tensors.extra_sections(self._extras.down))

    def _beside(self, order: Order) -> int:
        """The same to this client."""
        if self._table is None:
            return self._extra_bytes
        own = self._table.bytes if generation(self._numbers(order.version), order.client) else 0
        return self._extra_bytes + own

    def _numbers(self, version: int) -> Numbers:
        return self._versions.open(version).facts.numbers

    def train(self, client: str, order: Order, steps: int, update: str, final: bool) -> Worked:
        base = self._links.model(order)
        trained = self._crew.trained(self._job(order, steps), partial(self._start, order))
        self.keeps.keep(client).hold(update, trained.state)
        if final:
            self._done[client] = self._done.get(client, 0) + trained.steps
            del self._orders[client][order.id]
            self.keeps.end(order.id)
        metrics = dict(trained.metrics)
        groups: dict[str, Tensor] = {
            group: tensors.flatten(self.manifest, trained.tensors, group)
            if self._noise is None
            else base.read(group)
            for group in TRAVELLING[1:]
            if self.manifest.counts[group]
        }
        start = base.read("trainable")
        groups["trainable"] = tensors.delta(self.manifest, start, trained.tensors)
        if self._noise is not None:
            metrics = self._noise.protect(client, update, groups["trainable"])
        if client in self._attacks:
            groups["trainable"] = self._attacks[client].on_delta(groups["trainable"])
        groups |= tensors.extra_groups(self._extras.up, trained.extras, trained.said, self._says)
        sender = self.keeps.sender(client, final)
        sections, view = tensors.pack(self.manifest, groups, sender, extras=self._extras.up)
        payload = Payload(sections, view, self._links.codec(client))
        self._held[update] = UpdateBytes(update, payload, client)
        if final:
            self.keeps.sent(update, client, sender.after)
            self._drop(order.id)
        return Worked(trained.examples, metrics, len(view))

    def _drop(self, order: str) -> None:
        self._crew.forget(order)
        self._links.forget(order)

    def _job(self, order: Order, steps: int) -> Job:
        done = self._done.get(order.client, 0)
        job = Job(order.id, order.client, order.version, steps, done, order.extra)
        if self._merger.half is None and not self._rules:
            return job
        base, zero = self._versions.open(order.version), torch.zeros(self._count)
        numbers, extra, own = base.facts.numbers, {}, {}
        if self._table is not None:
            extra = told_to(numbers, order.client)
            row = self._table.row(numbers, order.client)
            own = {self._table.name: row} if row is not None else {}
        return replace(
            job,
            own=own,
            extra={**told(numbers), **order.extra, **extra},
            extras={name: base.outer.get(name, zero) for name in self._extras.down},
            state=self.keeps.found(order.id),
            latest=self.keeps.now(order.client),
            life=self.keeps.keep(order.client).life,
        )

    def _start(self, order: Order) -> dict[str, Tensor]:
        return self._links.tensors(self._links.model(order))

    def merge(self, merge: Merge) -> Merged:
        base = self._newest
        items = [(self._held[update], weight) for update, weight in merge.items]
        draft = self._versions.draft(merge.version, base.number, self._merger.vectors)
        made = self._merger.merge(base, draft, items, merge.outer, merge.known)
        self._newest = draft.seal(merge.items)
        self.keeps.used(made.used)
        wanted = {v for orders in self._orders.values() for v in orders.values()}
        self._links.follow(merge.version, wanted)
        self._versions.prune({merge.version, *wanted})
        if self._table is not None:
            starts = {c: list(map(self._numbers, o.values())) for c, o in self._orders.items()}
            self._table.prune(self._newest.facts.numbers, starts)
        paid = self._noise.paid() if self._noise is not None else {}
        return Merged(merge.version, made.used, made.dropped, {**made.stats, **paid})

    def evaluate(self, version: int) -> Mapping[str, float]:
        if self._judge is None:
            return {}
        contract.load(self._judge, self._versions.open(version).tensors())
        return contract.evaluate(self._judge)

    def forget(self, update: str, fate: Fate) -> None:
        held = self._held.pop(update, None)
        if held is not None:
            self.keeps.settle(held, fate)

    def upload(self, client: str) -> int:
        sections = tensors.sections_of(self.manifest, self._links.codec(client))
        return sum(s.length for s in (*sections, *tensors.extra_sections(self._extras.up)))

    def sizes(self) -> tuple[int, int]:
        """Bytes of an update, of who asked for no codec, and of a model."""
        down = sum(s.length for s in tensors.sections_of(self.manifest, FP32))
        return self.upload(""), down + self._extra_bytes

    def close(self) -> None:
        """Let the crew's processes go, where it has any."""
        self._crew.close()

    def save(self, path: Path) -> Path:
        """The newest version as a safetensors file. ServerError FL-S203."""
        self._versions.export(self._newest, path)
        return path

    def model(self) -> dict[str, Tensor]:
        """The newest version's tensors, by name; they alias it."""
        return self._newest.tensors()


def _named(proxy: "str | Data") -> str:
    """Of proxy data, for a run's spec."""
    return proxy if isinstance(proxy, str) else "own"
