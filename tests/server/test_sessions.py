"""Sessions: what waits to be written to one client, in order and not without bound."""

import asyncio

import pytest

from atoll.protocols import messages, wire_pb2
from atoll.protocols.blobs import INLINE, BlobInfo, Section
from atoll.protocols.errors import RemoteError
from atoll.protocols.lifted import server_messages
from atoll.protocols.packed import BULK
from atoll.protocols.sent import Sent, packed_sent
from atoll.server.sessions import LATER, QUEUE, Session, Sessions
from tests.jumping import run


def order(number: int, size: int = 0) -> wire_pb2.ServerMessage:
    model = wire_pb2.Blob(inline=bytes(size))
    return wire_pb2.ServerMessage(order=wire_pb2.Order(id=f"o{number}", model=model))


def outcome(number: int) -> wire_pb2.ServerMessage:
    return wire_pb2.ServerMessage(outcome=wire_pb2.Outcome(update=f"o{number}.0"))


def tell(session: Session, number: int) -> None:
    session.send_later(f"o{number}.0", outcome(number).SerializeToString)


async def read(session: Session) -> wire_pb2.ServerMessage | None:
    """The next message, as its client parses it."""
    data = await session.next()
    return None if data is None else wire_pb2.ServerMessage.FromString(data)


async def written(session: Session) -> list[str]:
    """All that is sent until the stream ends, each message with those that travel in it."""
    found = []
    async with asyncio.timeout(5):
        while (message := await read(session)) is not None:
            together = (message, *message.more)
            found += [*(one.order.id or one.outcome.update for one in together), "|"]
    return found


def test_what_is_not_urgent_travels_before_the_next_that_is() -> None:
    async def send() -> list[str]:
        session = Session("c", 1)
        tell(session, 1)
        tell(session, 2)
        session.send(order(3))
        session.close()
        return await written(session)

    assert run(send) == ["o1.0", "|", "o2.0", "|", "o3", "|"]


def test_an_order_behind_an_outcome_stands_where_its_model_is_found() -> None:
    async def send() -> bytes | None:
        session = Session("c", 1, batch=True)
        tell(session, 1)
        info = BlobInfo("v1/fp32", BULK, b"", (Section("trainable", "fp32", BULK // 4, BULK),))
        told = messages.Order("o2", 0, 1, 1, None)
        sent = packed_sent(Sent(1, info, bytes(BULK)))
        session.send_parts(messages.packed_order(told, sent))
        return await session.next()

    data = run(send)
    assert data is not None
    assert [len(bulk) for _, bulk in server_messages(data)] == [0, BULK]


def test_an_outcome_stands_for_the_receipt_that_still_waits() -> None:
    async def send() -> list[str]:
        session = Session("c", 1)
        for update in ("o1.0", "o2.0"):
            receipt = wire_pb2.Receipt(update=update)
            session.send_later(update, wire_pb2.ServerMessage(receipt=receipt).SerializeToString)
        tell(session, 1)
        session.close()
        kinds = []
        while (message := await read(session)) is not None:
            kinds.append(str(message.WhichOneof("kind")))
        return kinds

    assert run(send) == ["receipt", "outcome"]


def test_outcomes_come_in_the_order_in_which_they_were_decided() -> None:
    """The second result of a client completed a merge of both: its outcome took the place of its
    receipt, which waited already, and came before the first's. Of two that rest on one control
    variate the server counts the first, and the client counted the other: after 30 versions of
    FedCompass with SCAFFOLD-M, N c was 0.13 away from the sum of the c_i, of length 0.29."""

    async def send() -> list[str]:
        session = Session("c", 1)
        receipt = wire_pb2.Receipt(update="o2.0")
        session.send_later("o2.0", wire_pb2.ServerMessage(receipt=receipt).SerializeToString)
        tell(session, 1)
        tell(session, 2)
        session.close()
        return await written(session)

    assert run(send) == ["o1.0", "|", "o2.0", "|"]


def test_what_nothing_urgent_follows_is_sent_all_the_same() -> None:
    async def send() -> float:
        session = Session("c", 1)
        tell(session, 1)
        began = asyncio.get_running_loop().time()
        message = await asyncio.wait_for(read(session), 5)
        assert message is not None
        assert message.outcome.update == "o1.0"
        return asyncio.get_running_loop().time() - began

    assert run(send) == pytest.approx(LATER)


def test_what_travelled_with_another_hurries_nothing_that_waits_after_it() -> None:
    """Each receipt's own timer stayed behind and sent the next one alone: twice the messages."""

    async def send() -> int:
        session = Session("c", 1)
        tell(session, 1)
        session.send(order(2))
        await asyncio.sleep(LATER / 2)
        tell(session, 3)
        await asyncio.sleep(LATER * 0.6)
        return len(session.out)

    assert run(send) == 2


def test_closing_lets_out_what_waits() -> None:
    async def send() -> list[str]:
        session = Session("c", 1)
        tell(session, 1)
        session.close()
        return await written(session)

    assert run(send) == ["o1.0", "|"]


def test_a_client_that_reads_batches_gets_them_within_bounds() -> None:
    async def send() -> list[str]:
        session = Session("c", 1, batch=True)
        session.send(outcome(1))
        session.send(outcome(2))
        session.send(order(3, INLINE))
        session.send(order(4, INLINE))
        session.send(order(5))
        session.close()
        return await written(session)

    # One message may not grow without bound: each of these models fills it.
    assert run(send) == ["o1.0", "o2.0", "o3", "|", "o4", "|", "o5", "|"]


def test_a_client_that_does_not_read_is_cut_off() -> None:
    async def send() -> tuple[bool, bool, int]:
        session = Session("c", 1)
        for number in range(QUEUE):
            session.send(outcome(number))
        before = session.cut.is_set()
        session.send(order(0))
        return before, session.cut.is_set(), len(session.out)

    assert run(send) == (False, True, QUEUE)


def test_a_backlog_of_outcomes_leaves_room_for_the_rest() -> None:
    """At a hello the 300 outcomes of one long merge pushed the welcome out of the queue, and the
    client came back for ever without ever being welcomed."""

    async def send() -> list[str]:
        session = Session("c", 1)
        session.room += 300
        session.send(order(0))
        for number in range(300):
            tell(session, number)
        session.send(order(1))
        assert not session.cut.is_set()
        session.close()
        return await written(session)

    found = run(send)
    assert (found[0], found[-2], len(found)) == ("o0", "o1", 604)


def test_a_newer_session_of_a_client_takes_the_place_of_the_older() -> None:
    async def open_() -> None:
        sessions = Sessions()
        old = sessions.open("c", 1)
        assert sessions.find(old.token) is old
        new = sessions.open("c", 2)
        assert await written(old) == []
        assert sessions.of["c"] is new
        sessions.drop(old)  # it ends a moment later
        assert sessions.of["c"] is new
        with pytest.raises(RemoteError) as stranger:
            sessions.find(old.token)
        assert (stranger.value.code, stranger.value.fatal) == ("FL-W110", False)
        sessions.drop(new)
        assert sessions.of == {}
        assert len({old.token, new.token, Session("c", 3).token}) == 3

    run(open_)
