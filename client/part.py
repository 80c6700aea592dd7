"""Part: what a client takes part with: its trainer, how much it holds, how fast it is."""

from collections.abc import Callable
from importlib import metadata
from typing import cast

from atoll.client import contract
from atoll.client.answering import Answering
from atoll.client.keep import Keep
from atoll.client.line import Line
from atoll.client.links import asked_of, capabilities
from atoll.client.localdp import LocalDP, local_dp, stricter
from atoll.client.outbox import Outbox
from atoll.client.trainer import Trainer
from atoll.client.work import Workbench
from atoll.protocols import chains, messages, wire_pb2
from atoll.protocols.codecs import FP32
from atoll.protocols.errors import ClientError
from atoll.protocols.events import ClientInfo
from atoll.protocols.manifest import Manifest
from atoll.protocols.runinfo import RunInfo

Maker = Callable[[RunInfo], Trainer]

PROTOCOL = 1
BATCH = "batch"  # capability: several server messages in one


class Part:
    """`examples` None: the trainer says. `pace`: seconds a step, or what measures them."""

    def __init__(
        self,
        name: str,
        trainer: Trainer | Maker,
        examples: int | None,
        pace: float | Callable[[Trainer], float] | None,
        codec: str,
        private: LocalDP | None,
        outbox: Outbox,
        keep: Keep,
        line: Callable[[], Line | None],
    ) -> None:
        self.asked = asked_of(codec)
        self.answering: Answering | None = None  # where it judges models in a merge
        self._name = name
        self._trainer = trainer
        self._examples = examples
        self._pace = pace
        self._private = private
        self._outbox = outbox
        self._keep = keep
        self._line = line
        self._info = ClientInfo(0)

    def make(self, info: RunInfo) -> Workbench:
        """The trainer at its bench, once the run is known. Blocks. ClientError FL-C103 where its
        model is not the run's."""
        made = self._trainer
        trainer = cast("Trainer", made) if hasattr(made, "train") else made(info)
        mine = getattr(trainer, "manifest", None)
        if isinstance(mine, Manifest) and (differs := info.manifest.difference(mine)):
            raise ClientError(
                "FL-C103",
                f"this client's model is not the run's: {differs}",
                f"give it the run's model ({info.model}): see `fl-client test`",
            )
        examples = self._examples
        if examples is None:
            examples = contract.examples(trainer)
        pace = self._pace(trainer) if callable(self._pace) else self._pace
        runs = local_dp(info.local_dp) if info.local_dp else None
        private = stricter(self._private, runs)
        validator = getattr(trainer, "validator", None) if info.validate else None
        self.answering = None  # another run's may have been
        if validator is not None and private is None:  # a gradient there would carry no noise
            self.answering = Answering(self._name, info.manifest, validator, self._line)
        judges = (messages.VALIDATE,) if self.answering is not None else ()
        can = (BATCH, *capabilities(self.asked), *judges)
        self._info = ClientInfo(examples, pace, can)
        return Workbench(trainer, info.manifest, FP32, FP32, self._outbox, self._keep, private)

    def hello(self, bench: Workbench, holding: tuple[str, ...]) -> wire_pb2.Hello:
        """What it says of itself; `holding` are the orders in hand."""
        memory, held = self._outbox.memory, bench.holding.held
        return messages.hello_to_wire(
            messages.Hello(
                PROTOCOL, memory.run, self._name, memory.node, self._info,
                bench.manifest.schema, holding, metadata.version("atoll"), self._keep.report(),
                self.asked, chains.spoken(*held) if held is not None else "",
            )
        )  # fmt: skip

    def close(self) -> None:
        if self.answering is not None:
            self.answering.close()
