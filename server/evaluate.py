"""Evaluate: metrics of versions on the server's own test data, newest first, never in the way.

One thread. A version offered while another is being evaluated replaces one that still waits, so a
slow evaluation skips versions and never makes a `Train` wait.
"""

import logging
import threading
from collections.abc import Callable, Mapping

from torch import Tensor

from atoll.client import contract
from atoll.client.contract import Judge
from atoll.protocols.errors import AtollError

logger = logging.getLogger(__name__)


class Evaluator:
    """`read` gives a version's tensors; `report` is called, in this thread, with its metrics, or
    `failed` where it could not be evaluated."""

    def __init__(
        self,
        judge: Judge,
        read: Callable[[int], Mapping[str, Tensor]],
        report: Callable[[int, Mapping[str, float]], None],
        failed: Callable[[int], None],
    ) -> None:
        self._judge = judge
        self._read = read
        self._report = report
        self._failed = failed
        self._waiting: int | None = None
        self._closed = False
        self._said = ""  # of the last failure
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="evaluate", daemon=True)
        self._thread.start()

    def offer(self, version: int) -> None:
        """Evaluate this version next, unless a newer one comes first."""
        with self._news:
            self._waiting = version
            self._news.notify()

    def close(self, seconds: float = 60.0) -> None:
        """End after the version in work; one that waits is left."""
        with self._news:
            self._closed = True
            self._waiting = None
            self._news.notify()
        self._thread.join(seconds)

    def _work(self) -> None:
        while True:
            with self._news:
                while self._waiting is None and not self._closed:
                    self._news.wait()
                version, self._waiting = self._waiting, None
            if version is None:
                return
            try:
                contract.load(self._judge, self._read(version))
                metrics = contract.evaluate(self._judge)
            except Exception as error:  # noqa: BLE001  # it is told, and training goes on
                self._say(version, error)
                self._failed(version)
            else:
                self._report(version, metrics)

    def _say(self, version: int, error: Exception) -> None:
        """What fails in the same way at every version is said once."""
        if str(error) == self._said:
            return
        self._said = str(error)
        expected = isinstance(error, AtollError)  # of a user's model, which may do anything
        where = not expected or logger.isEnabledFor(logging.INFO)
        logger.warning("version=%d could not be evaluated: %s", version, error, exc_info=where)
