"""Crew: who trains the clients of a simulated run: one after another, many at once, or elsewhere.

Virtual time asks for a result when it arrives, and has said long before that it will: from `begin`
on, an order may be trained ahead together with others. What was begun and never asked for (its
client died) costs work and changes nothing; what is asked for otherwise than it was begun (stopped
early, a snapshot) is trained anew, alone. So every crew gives the same results.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from atoll.client import contract, stacked
from atoll.client.local import TorchTrainer
from atoll.client.trainer import Task, Tensors, Trained, Trainer

Start = Callable[[], Tensors]  # gives the model that a job starts from, until it is forgotten
AHEAD = 256 << 20  # bytes of results that are trained ahead and kept, at most


@dataclass(frozen=True, slots=True)
class Job:
    """One order as a crew sees it."""

    order: str
    client: str
    version: int  # of the model it starts from
    steps: int
    done: int  # local steps its client has run before
    extra: Mapping[str, float] = field(default_factory=dict)
    # What a local algorithm brings besides; follows from the above.
    extras: Tensors = field(default_factory=dict, compare=False)  # came beside the model
    own: Tensors = field(default_factory=dict, compare=False)  # the same, for this client alone
    state: Mapping[str, Tensors] = field(default_factory=dict, compare=False)  # as it was found
    latest: Mapping[str, Tensors] = field(default_factory=dict, compare=False)  # as it is now
    life: int = field(default=0, compare=False)

    def task(self) -> Task:
        return Task(
            self.steps, self.done, self.extra, extras={**self.extras, **self.own}, life=self.life,
            state=lambda kind: self.state.get(kind, {}),
            latest=lambda kind: self.latest.get(kind, {}),
        )  # fmt: skip


class Crew(Protocol):
    def begin(self, job: Job, start: Start) -> None:
        """It will be asked for, in all probability."""

    def trained(self, job: Job, start: Start) -> Trained:
        """What it comes to. Its tensors hold until the next call.

        Raises ClientError FL-C104 where the loss is no longer a number.
        """

    def forget(self, order: str) -> None:
        """It will not be asked for any more."""

    def close(self) -> None:
        """Let go of whatever the crew holds outside of this process."""


class OneByOne:
    """Each client by its own trainer, when its result is asked for."""

    def __init__(self, factory: Callable[[str], Trainer]) -> None:
        self._factory = factory
        self._trainers: dict[str, Trainer] = {}

    def trainer(self, client: str) -> Trainer:
        if client not in self._trainers:
            self._trainers[client] = self._factory(client)
        return self._trainers[client]

    def begin(self, job: Job, start: Start) -> None:
        pass

    def trained(self, job: Job, start: Start) -> Trained:
        trainer = self.trainer(job.client)
        contract.load(trainer, start())
        return contract.train(trainer, job.task())

    def forget(self, order: str) -> None:
        pass

    def close(self) -> None:
        pass


class Together(OneByOne):
    """All orders that are under way at once, where their trainers can be stacked."""

    def __init__(self, factory: Callable[[str], Trainer]) -> None:
        super().__init__(factory)
        self._stacked: dict[str, TorchTrainer | None] = {}  # None: only alone
        self._begun: dict[str, tuple[Job, Start]] = {}
        self._made: dict[str, tuple[Job, Trained]] = {}

    def begin(self, job: Job, start: Start) -> None:
        if self._stackable(job.client) is not None:
            self._begun[job.order] = (job, start)

    def trained(self, job: Job, start: Start) -> Trained:
        begun = self._begun.get(job.order)
        if begun is not None and begun[0] == job:
            self._train(job.order)
        made = self._made.get(job.order)
        if made is None or made[0] != job:
            return super().trained(job, start)
        return made[1]

    def forget(self, order: str) -> None:
        self._begun.pop(order, None)
        self._made.pop(order, None)

    def _stackable(self, client: str) -> TorchTrainer | None:
        if client not in self._stacked:
            trainer = self.trainer(client)
            self._stacked[client] = trainer if stacked.fits(trainer) else None
        return self._stacked[client]

    def _train(self, wanted: str) -> None:
        """That order, and with it the oldest of each other client."""
        chosen = {self._begun[wanted][0].client: wanted}
        for order, (job, _) in self._begun.items():
            chosen.setdefault(job.client, order)
        size = sum(t.numel() * t.element_size() for t in self._begun[wanted][1]().values())
        room = max(1, AHEAD // size - len(self._made))
        jobs, works = [], []
        for client, order in list(chosen.items())[:room]:
            job, start = self._begun.pop(order)
            trainer = self._stackable(client)
            assert trainer is not None, "what was begun can be stacked"
            jobs.append(job)
            works.append(stacked.Work(trainer, start(), job.task()))
        for job, made in zip(jobs, stacked.train(works), strict=True):
            if made is not None:  # else it is trained alone when it is asked for, and fails there
                self._made[job.order] = (job, made)
