"""Judging: versions that the clients judge, where the server has no test data; see `panel.py`."""

import logging
from collections.abc import Callable

from atoll.protocols import messages, wire_pb2
from atoll.protocols.events import Evaluated
from atoll.protocols.later import Later
from atoll.protocols.sent import sent_to_evaluate
from atoll.server import plausible
from atoll.server.driver import Driver
from atoll.server.outgoing import Outgoing
from atoll.server.panel import Judged, Panel
from atoll.server.sessions import Sessions

logger = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds after which a version's judges are not waited for, where others are there
LAST_WORD = 30.0  # seconds in which they may judge what a run has ended with


class Judging:
    """All of it in the loop's thread. `most_examples`: what a client may claim; 0: anything."""

    def __init__(
        self,
        sessions: Sessions,
        outgoing: Outgoing,
        driver: Callable[[], Driver],
        most_examples: int,
    ) -> None:
        self._sessions = sessions
        self._outgoing = outgoing
        self._driver = driver
        self._most = most_examples
        self._panel = Panel()
        self._patience = Later(self._enough)
        self._last_word = Later(self._end)
        self._ending = self._over = False

    def offer(self, version: int) -> None:
        """It is published."""
        self._panel.offer(version)
        self.ask()

    def ask(self) -> None:
        """Send the version that waits, if any, to those who are here."""
        version = self._panel.ask(list(self._sessions.of))
        if version is None:
            return
        self._patience.done()
        self._patience.within(PATIENCE)
        for session in [self._sessions.of[client] for client in sorted(self._panel.asked)]:
            load = self._outgoing.load(session, version)
            if load is not None:
                asked = sent_to_evaluate(load.sent)
                session.send(wire_pb2.ServerMessage(evaluate=asked))

    def heard(self, client: str, told: wire_pb2.Evaluation) -> None:
        found = plausible.judged(messages.metrics_from_wire(told.metrics))
        examples = plausible.examples(told.examples, self._most)
        self._says(self._panel.answer(client, told.version, found, examples))

    def lost(self, client: str) -> None:
        self._says(self._panel.gone(client))

    def busy(self) -> bool:
        """Whether a run that has ended is to wait: for what clients say of what it ended with."""
        if self._over or not self._panel.busy:
            return False
        if not self._ending:
            self._ending = True
            self._last_word.within(LAST_WORD)
        return True

    def close(self) -> None:
        self._patience.close()
        self._last_word.close()

    def _enough(self) -> None:
        if not self._panel.busy:
            return
        others = self._sessions.of.keys() - self._panel.asked - self._panel.late
        if self._panel.answers or others:
            self._leave()
        else:  # judging takes long here
            self._patience.within(PATIENCE)

    def _end(self) -> None:
        self._over = True
        self._leave()

    def _leave(self) -> None:
        """Whoever has not judged what is out is not waited for."""
        if self._panel.busy:
            late = ", ".join(sorted(self._panel.asked))
            words = self._panel.version, late
            logger.warning("version=%d is not judged yet by %s, who is not waited for", *words)
            self._says(self._panel.close())

    def _says(self, found: Judged | None) -> None:
        if found is not None:
            for client, names in self._panel.lacking().items():
                words = client, ", ".join(names), found[0]
                logger.warning("client=%s gives no %s (version=%d): others' counts", *words)
            self._driver().post(Evaluated(*found))
        self.ask()
        self._driver().wake()  # the last one may have been waited for
