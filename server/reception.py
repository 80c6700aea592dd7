"""Reception: who comes, is back, is silent, goes or is sent away; and the last word to all.

Between the control streams and the membership machine. What a client says in between is heard by
`host.py`.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Sequence

from atoll.protocols import messages, refusals, state, wire_pb2
from atoll.protocols.blobs import CHUNK, INLINE
from atoll.protocols.errors import RemoteError
from atoll.protocols.events import ClientInfo, ClientJoined, ClientLeft
from atoll.protocols.links import Link
from atoll.protocols.membership import Back, Joined, Left, Membership
from atoll.server import plausible
from atoll.server.driver import Driver
from atoll.server.links import Links, held_by
from atoll.server.outgoing import Outgoing
from atoll.server.questions import Questions
from atoll.server.run import Run
from atoll.server.sessions import Session, Sessions
from atoll.server.spec import RunSpec
from atoll.server.totals import Row, Totals
from atoll.server.workshop import Workshop

logger = logging.getLogger(__name__)

PROTOCOL = 1
FROZEN = 1 / 3  # of a lease: a look so late says that nobody was listened to meanwhile
BATCH = "batch"  # capability of clients that read several messages in one


class Reception:
    """`driver` says who is given the inputs; `lost` hears whose control stream ended."""

    def __init__(
        self,
        spec: RunSpec,
        run: Run,
        membership: Membership,
        workshop: Workshop,
        links: Links,
        history: Totals,
        sessions: Sessions,
        outgoing: Outgoing,
        questions: Questions,
        note: Callable[[Sequence[Row]], None],
        driver: Callable[[], Driver],
        lost: Callable[[str], None],
    ) -> None:
        self._spec = spec
        self._run = run
        self._membership = membership
        self._workshop = workshop
        self._links = links
        self._history = history
        self._sessions = sessions
        self._outgoing = outgoing
        self._questions = questions
        self._note = note
        self._driver = driver
        self._lost = lost
        self._manifest = json.dumps(workshop.store.manifest.to_json())
        self._changed = False  # the membership, since it was written down
        self._lease: asyncio.TimerHandle | None = None
        self._bye: wire_pb2.Goodbye | None = None  # said for good
        self._told: set[str] = set()  # who heard it

    def open(self) -> None:
        """Leases run."""
        self._arm_lease()

    def close(self) -> None:
        if self._lease is not None:
            self._lease.cancel()

    def news(self) -> list[tuple[str, str]]:
        """The membership as a meta row for the journal, where it has changed."""
        if not self._changed:
            return []
        self._changed = False
        return [("membership", state.dumps(self._membership))]

    async def greet(self, hello: messages.Hello) -> Session:
        """Take a client in, when all that was decided about it is written: it may be told of it.
        RemoteError where it cannot take part."""
        greeted: asyncio.Future[Session] = asyncio.get_running_loop().create_future()

        def now() -> None:
            if greeted.cancelled():  # it hung up while it waited
                return
            try:
                session = self.hello(hello)
            except Exception as error:  # noqa: BLE001  # whoever greets hears of it
                greeted.set_exception(error)
            else:
                greeted.set_result(session)

        self._driver().after(now)
        return await greeted

    def hello(self, hello: messages.Hello) -> Session:
        """The same, at once."""
        link = self._check_hello(hello)
        decision = self._membership.hello(hello.client, hello.node, self._driver().clock.now())
        self._supersede(hello.client)
        session = self._sessions.open(hello.client, decision.fence)
        session.link, session.held = link, held_by(hello.base)
        session.former = frozenset(hello.holding)
        self._links.agreed(hello.client, link)
        session.batch = BATCH in hello.info.capabilities
        session.send(wire_pb2.ServerMessage(welcome=self._welcome(session)))
        self._note_lost_state(hello)
        untold = list(self._run.untold.get(hello.client, {}).values())
        session.room += len(untold)
        for outcome in untold:
            self._outgoing.outcome(session, outcome)
        if isinstance(decision, Joined):
            self._joined(hello, decision)
        else:
            self._back(hello, decision, session)
        if self._bye is not None:
            self._say_bye(session, self._bye)
        self._questions.came(hello.client, hello.info.capabilities)
        self._arm_lease()
        return session

    def _supersede(self, client: str) -> None:
        """The last words to a former session. One process reads only its newest, so nobody hears
        them but a second one of the same client."""
        if (former := self._sessions.of.get(client)) is not None:
            error = RemoteError(
                "FL-C105",
                f"client {client!r} was started again elsewhere, from a copy of its directory",
                "run one of the two; another client takes a --name and a --dir of its own",
            )
            former.send(wire_pb2.ServerMessage(refusal=refusals.error_to_wire(error)))

    def _joined(self, hello: messages.Hello, joined: Joined) -> None:
        self._changed = True
        known = hello.info.seconds_per_step or joined.seconds_per_step
        held = plausible.examples(hello.info.examples, self._spec.most_examples)
        info = ClientInfo(held, known, hello.info.capabilities)
        logger.info("client=%s joined%s", joined.name, " again" if joined.again else "")
        self._driver().post(ClientJoined(joined.name, info))

    def _note_lost_state(self, hello: messages.Hello) -> None:
        """A client whose work we had keeps private state of each outcome: without any, it has lost
        it, as with a new disk. What follows from that is the method's affair (`client/keep.py`)."""
        totals = self._history.clients.get(hello.client)
        lost = sorted(kind for kind, outcomes in hello.kept.items() if not outcomes)
        if lost and totals is not None and totals.updates:
            what = ", ".join(lost)
            logger.warning("client=%s lost its state: %s", hello.client, what)
            self._note([
                {"t": self._driver().clock.now(), "kind": "state-lost", "client": hello.client,
                 "state": what}
            ])  # fmt: skip

    def _back(self, hello: messages.Hello, back: Back, session: Session) -> None:
        """Within its lease: its order goes on, or is sent again where it was lost on the way."""
        now = self._driver().clock.now()
        logger.info("client=%s is back after %.1f s", back.name, back.silent)
        silent = round(back.silent, 3)
        self._note([{"t": now, "kind": "back", "client": back.name, "silent": silent}])
        order = self._run.open.get(back.name)
        if order is None or order.started is None or order.id in hello.holding:
            return
        if order.version in self._workshop.store.numbers():
            self._outgoing.order(session, order)
        else:
            self._renew(hello, session, f"version {order.version} of its order is gone")

    def _renew(self, hello: messages.Hello, session: Session, reason: str) -> None:
        """Let a client leave and join in one breath: its open order cannot be done any more."""
        now = self._driver().clock.now()
        left = self._membership.expel(session.client, now, reason)
        if left is not None:
            self.left(left)
        again = self._membership.hello(hello.client, hello.node, now)
        assert isinstance(again, Joined)
        session.fence = again.fence
        self._joined(hello, again)

    def gone(self, session: Session, reason: str) -> None:
        """A control stream ended. Within its lease the client may come back."""
        self._sessions.drop(session)
        self._lost(session.client)
        self._membership.broken(session.client, session.fence, self._driver().clock.now(), reason)
        if session.client not in self._sessions.of:
            self._questions.silent(session.client)
        self._arm_lease()

    def _check_hello(self, hello: messages.Hello) -> Link:
        """The codecs it gets."""
        if hello.protocol != PROTOCOL:
            raise RemoteError(
                "FL-C102",
                f"client speaks protocol {hello.protocol}, this server {PROTOCOL}",
                "install the same version of atoll on both sides",
            )
        if hello.run and hello.run != self._spec.id:
            raise RemoteError(
                "FL-S107", f"no run {hello.run!r} here", f"this server runs {self._spec.id}"
            )
        schema = self._workshop.store.manifest.schema
        if hello.schema and hello.schema != schema:
            raise RemoteError(
                "FL-W104",
                f"the client's model has schema {hello.schema[:12]}, the run's {schema[:12]}",
                "give the client the run's model: see `fl-client test`",
            )
        if self._run.finished is not None and hello.client not in self._membership.alive():
            raise RemoteError(
                "FL-S107", f"the run is over: {self._run.finished}", "start a new one"
            )
        return self._links.allowed.agree(hello.asked, hello.info.capabilities)

    def _welcome(self, session: Session) -> wire_pb2.Welcome:
        return wire_pb2.Welcome(
            run=self._spec.id,
            session=session.token,
            chunk_bytes=CHUNK,
            inline_limit=INLINE,
            lease_seconds=self._spec.lease,
            heartbeat_seconds=max(0.5, self._spec.lease / 20),  # also how fresh progress bars are
            up_codec=session.link.up,
            down_codec=session.link.down,
            spec=self._spec.for_clients(),
            manifest=self._manifest,
        )

    def left(self, left: Left) -> None:
        logger.info("client=%s left: %s", left.name, left.reason)
        self._changed = True
        self._questions.left(left.name)
        self._links.left(left.name)
        self._driver().post(ClientLeft(left.name, left.reason))

    def expel(self, client: str, reason: str, error: RemoteError) -> None:
        """It has left, whether it likes it or not; `error` is the last it hears."""
        left = self._membership.expel(client, self._driver().clock.now(), reason)
        if left is not None:
            self.left(left)
        session = self._sessions.of.get(client)
        if session is not None:
            session.send(wire_pb2.ServerMessage(refusal=refusals.error_to_wire(error)))
            self._sessions.drop(session)
            session.close()

    def _arm_lease(self) -> None:
        if self._lease is not None:
            self._lease.cancel()
        due = self._membership.due()
        if due is not None:
            loop = asyncio.get_running_loop()
            self._lease = loop.call_later(self._driver().clock.wall(due) + 0.01, self._tick)

    def _tick(self) -> None:
        now, due = self._driver().clock.now(), self._membership.due()
        if due is not None and now - due > FROZEN * self._membership.lease:
            logger.warning("run=%s was frozen, every lease starts anew", self._spec.id)
            self._membership.restart(now, "the server was frozen")
        for decision in self._membership.tick(now):
            if isinstance(decision, Left):
                self.left(decision)
                session = self._sessions.of.get(decision.name)
                if session is not None:
                    self._sessions.drop(session)
                    session.close()
        self._arm_lease()

    def farewell(self, reason: str, done: bool, retry_seconds: float = 1.0) -> None:
        """Say goodbye to all who are here; `done`: also to those who come from now on."""
        bye = wire_pb2.Goodbye(reason=reason, done=done, retry_seconds=retry_seconds)
        if done:
            self._bye = bye
        for session in list(self._sessions.of.values()):
            self._say_bye(session, bye)

    def _say_bye(self, session: Session, bye: wire_pb2.Goodbye) -> None:
        self._told.add(session.client)
        session.send(wire_pb2.ServerMessage(goodbye=bye))
        session.close()

    def dismiss(self) -> bool:
        """Those who heard the last goodbye are no members any more. False where none was said."""
        if self._bye is None:
            return False
        for client in sorted(self._told):
            self._membership.expel(client, self._driver().clock.now(), "the run is over")
        return True

    async def linger(self) -> None:
        """Until all members have heard the goodbye, or their leases end: one that lost us for a
        moment would look for us for ever."""
        while set(self._membership.alive()) - self._told:
            await asyncio.sleep(0.05)
            self._membership.tick(self._driver().clock.now())

    def authorize(self, metadata: object) -> str:
        token = dict(metadata).get(messages.SESSION_KEY, "")  # type: ignore[call-overload]
        session = self._sessions.find(str(token))
        self._membership.heard(session.client, session.fence, self._driver().clock.now())
        return session.client
