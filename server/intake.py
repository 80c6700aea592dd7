"""Intake: results on their way in. Is one welcome, is it whole, then it is an input of the run.

What a client sends that can never be used ends its membership, and nothing else.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from atoll.protocols import refusals, wire_pb2
from atoll.protocols.codecs import Codec
from atoll.protocols.errors import RemoteError
from atoll.protocols.events import Update, UpdateReceived
from atoll.protocols.membership import Membership
from atoll.protocols.messages import Result
from atoll.protocols.payload import Payload as Read
from atoll.protocols.payload import check, finite, parse
from atoll.server import plausible
from atoll.server.driver import Driver
from atoll.server.links import Links
from atoll.server.outgoing import Outgoing
from atoll.server.payloads import Payload
from atoll.server.run import Run
from atoll.server.sessions import Session, Sessions
from atoll.server.uploads import StoredUpdate, corrupt
from atoll.server.workshop import Workshop

logger = logging.getLogger(__name__)

Expel = Callable[[str, str, RemoteError], None]  # (client, reason, the last it hears)


class Intake:
    """`driver` says who is given the inputs."""

    def __init__(
        self,
        run: Run,
        membership: Membership,
        workshop: Workshop,
        links: Links,
        sessions: Sessions,
        outgoing: Outgoing,
        driver: Callable[[], Driver],
        expel: Expel,
    ) -> None:
        self.paces: dict[str, float] = {}  # client -> seconds a step, as last measured
        self._run = run
        self._membership = membership
        self._workshop = workshop
        self._links = links
        self._sessions = sessions
        self._outgoing = outgoing
        self._driver = driver
        self._expel = expel

    def may_upload(self, client: str, result: Result) -> str | None:
        """The id to store a result under; None where it is here already."""
        return None if self._welcome(client, result) is None else result.update

    def _welcome(self, client: str, result: Result) -> Codec | None:
        """What a result is packed with; None where it is here already."""
        expected = self._run.expects(client, result.order, result.update)
        if expected == "have":
            return None
        if expected == "unknown":
            raise RemoteError(
                "FL-W102",
                f"order {result.order} is not one of {client}'s, or was closed",
                "drop this result and wait for the next order",
            )
        info = result.payload
        manifest = self._workshop.store.manifest
        order = self._run.order(client, result.order)
        assert order is not None
        try:
            plausible.check_steps(result, order)
            packed, extras = self._packs(client, result), self._workshop.extras.up
            check(manifest, info.sections, info.size, packed, "update", extras)
        except RemoteError as error:
            self._refuse(client, error)
            raise
        return packed

    def _packs(self, client: str, result: Result) -> Codec:
        """What a result must be packed with: as agreed now, or when it was finished."""
        session = self._sessions.of.get(client)
        if session is None or result.order in session.former:
            return self._workshop.codecs.of(result.payload.sections)
        return self._links.up(session.link)

    async def accepted(self, client: str, result: Result, stored: StoredUpdate) -> None:
        """All bytes of a result are here: check them, write them down, tell the strategy."""
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(None, self._check, result, stored)
        except RemoteError as error:
            self._refuse(client, error)
            raise
        done = asyncio.Event()
        self._take(client, result, stored, done.set)
        await done.wait()

    def inline(self, session: Session, result: Result) -> None:
        try:
            packed = self._welcome(session.client, result)
        except RemoteError as error:
            if error.code != "FL-W102":
                raise
            refusal = refusals.error_to_wire(error, result.order)
            session.send(wire_pb2.ServerMessage(refusal=refusal))
            return
        told = partial(self._outgoing.receipt, session.client, result)
        if packed is None:
            self._driver().after(told)
            return
        update, info = result.update, result.payload
        stored = self._workshop.uploads.keep(update, result.inline)
        try:
            if info.sha256 and (found := hashlib.sha256(result.inline).digest()) != info.sha256:
                raise corrupt(update, found, info.sha256)
            if len(stored.data) != info.size:  # its sections were checked, its bytes are not there
                self._check(result, stored)
            payload = Read(info.sections, stored.view(), packed)
            finite(self._workshop.store.manifest, payload)
        except RemoteError as error:
            self._workshop.uploads.free(update)
            self._refuse(session.client, error)
            raise
        self._workshop.read[update] = payload
        self._take(session.client, result, stored, told)

    def _check(self, result: Result, stored: StoredUpdate) -> None:
        manifest = self._workshop.store.manifest
        sections = result.payload.sections
        packed, extras = self._workshop.codecs.of(sections), self._workshop.extras.up
        payload = parse(manifest, sections, stored.view(), packed, "update", extras)
        finite(manifest, payload)

    def _take(
        self, client: str, result: Result, stored: StoredUpdate, then: Callable[[], None]
    ) -> None:
        driver, update_id, info = self._driver(), result.update, result.payload
        if update_id in self._workshop.infos:
            driver.after(then)  # it came twice at once
            return
        self._workshop.infos[update_id] = info
        self._outgoing.counted(client).up += info.size
        order, clock = self._run.order(client, result.order), driver.clock
        since = None if order is None else order.started
        seconds = plausible.seconds(result.train_seconds, since, clock.now(), clock.began)
        update = Update(  # the run's book knows base and start
            update_id, result.order, client, 0, result.steps, result.examples,
            0.0, seconds, result.metrics, final=result.final,
        )  # fmt: skip
        data = stored.data if stored.path is None else None
        if info.sha256 != stored.sha256:
            info = replace(info, sha256=stored.sha256)
        driver.post(UpdateReceived(update), Payload(update_id, info, data), then)

    def learn_pace(self, update: Update) -> None:
        if update.steps > 0 and update.train_seconds > 0:
            self.paces[update.client] = update.train_seconds / update.steps
            if update.client in self._membership.members:
                self._membership.learned(update.client, update.train_seconds / update.steps)

    def _refuse(self, client: str, error: RemoteError) -> None:
        """What it sent can never be used: the run goes on without this client."""
        logger.warning("client=%s update refused: %s", client, error)
        self._expel(client, f"its update was refused: {error.code} {error.message}", error)
