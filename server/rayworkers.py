"""Ray workers: the crew of `server/workers.py` on a Ray cluster, for who outgrows one machine.

Needs `pip install atoll[ray]`. Every machine of the cluster must have this package, and the data
where the specs say; the models travel through Ray's object store. https://docs.ray.io
"""

import collections
import logging
import os
from collections.abc import Mapping
from typing import Any

from atoll.protocols.errors import ServerError, UsageError
from atoll.server.trainers import Trainers
from atoll.server.worker import Frame, Worker
from atoll.server.workers import Workers


class RayWorkers(Workers):
    """So many actors, each with a processor, on the cluster at `address`.

    Without an address a cluster is begun on this machine, bound to loopback, and ended by `close`.
    Raises UsageError FL-S104 where Ray is not installed.
    """

    def __init__(
        self, trainers: Trainers, workers: int, threads: int = 1, address: str | None = None
    ) -> None:
        self._ray = ray = _imported(address is None)
        spec = trainers.dumps()
        if address is None:
            ray.init(num_cpus=workers, include_dashboard=False, logging_level=logging.ERROR)
            _only_loopback(ray)
        else:
            ray.init(address, logging_level=logging.ERROR)
        actor = ray.remote(Actor)
        super().__init__(
            [RayLink(ray, actor.remote(spec, threads)) for _ in range(workers)], trainers.clients
        )

    def close(self) -> None:
        super().close()
        self._ray.shutdown()


def _imported(loopback: bool) -> Any:
    """Ray itself. It reads once, at its import, whether its servers listen beyond this machine."""
    if loopback:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # so it is called on Linux, too
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            "FL-S104", "--engine ray, but Ray is not installed",
            "pip install 'atoll[ray]', or use --workers with the other engine",
        ) from error  # fmt: skip
    return ray


def _only_loopback(ray: Any) -> None:
    """UsageError FL-S104 where the cluster just begun can be reached from other machines."""
    where = sorted({node["NodeManagerAddress"] for node in ray.nodes()})
    if where != ["127.0.0.1"]:
        ray.shutdown()
        raise UsageError(
            "FL-S104", f"Ray listens on {', '.join(where)}, since it was imported before",
            "import it later, or begin a cluster yourself and give its address",
        )  # fmt: skip


class Actor:
    """A worker as Ray sees it: plain values in and out."""

    def __init__(self, trainers: str, threads: int) -> None:
        self._worker = Worker(trainers, threads)

    def handle(self, head: Mapping[str, Any], body: bytes) -> list[tuple[Mapping[str, Any], bytes]]:
        return [(answer.head, answer.body) for answer in self._worker.handle(Frame(head, body))]


class RayLink:
    """Calls of one actor, which runs them in their order."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self._calls: collections.deque[Any] = collections.deque()

    def send(self, frame: Frame) -> None:
        self._calls.append(self._actor.handle.remote(dict(frame.head), frame.body))

    def receive(self) -> list[Frame]:
        assert self._calls, "it was sent something that will be answered"
        try:
            return [Frame(*answer) for answer in self._ray.get(self._calls.popleft())]
        except self._ray.exceptions.RayError as error:
            raise ServerError(
                "FL-S211", f"a Ray worker failed: {error}", "see Ray's log of that worker"
            ) from error

    def close(self) -> None:
        self._ray.kill(self._actor)
