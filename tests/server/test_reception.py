"""Who comes and goes, as the server's own clock has it."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from atoll.protocols import wire_pb2
from atoll.server.sessions import Session
from tests.server.test_standing import greeted
from tests.server.test_workshop import Life


def silence(life: Life, seconds: float) -> Callable[[], Awaitable[None]]:
    """So long nothing is heard, and then it is looked who is there."""

    async def pass_by() -> None:
        life.assembly.clock._base += seconds
        life.host.reception._tick()

    return pass_by


def test_a_server_that_was_frozen_lets_everyone_come_back(tmp_path: Path) -> None:
    """It woke after their leases, let all of them go and threw away what they had finished."""
    life = Life(tmp_path, lease=20.0)
    stood: list[str] = []

    async def noted() -> None:
        stood.append(life.host.membership.members["c"].standing)

    life.live(greeted(life), silence(life, 300), noted, silence(life, 11), silence(life, 10), noted)
    assert stood == ["suspect", "left"]
    life.die()


def test_who_falls_silent_leaves_at_the_end_of_its_lease(tmp_path: Path) -> None:
    life = Life(tmp_path, lease=20.0)
    life.live(greeted(life), silence(life, 14), silence(life, 7))
    assert life.host.membership.members["c"].standing == "left"
    life.die()


def test_of_two_processes_of_one_client_the_first_ends(tmp_path: Path) -> None:
    """Its directory was copied: both connected again and again, five times a second, for ever."""
    life = Life(tmp_path)
    sessions: list[Session] = []

    async def noted() -> None:
        sessions.append(life.host.sessions.of["c"])

    life.live(greeted(life), noted, greeted(life), noted)
    first, second = (heard(session) for session in sessions)
    assert [m.refusal.code for m in first if m.refusal.fatal] == ["FL-C105"]
    assert (
        first[-1].refusal.message
        == "client 'c' was started again elsewhere, from a copy of its directory"
    )
    assert "refusal" not in {m.WhichOneof("kind") for m in second}
    assert life.host.membership.members["c"].standing == "active"
    life.die()


@pytest.mark.parametrize(
    ("code", "hint"), [("FL-C104", "mend the trainer"), ("FL-S203", "mend that")]
)
def test_a_client_that_gives_up_hears_what_to_mend(tmp_path: Path, code: str, hint: str) -> None:
    """Its disk was full, and it was told to mend its trainer."""
    life = Life(tmp_path)
    told: list[wire_pb2.Refusal] = []

    async def fail() -> None:
        session = life.host.sessions.of["c"]
        failure = wire_pb2.Failure(order="o0", code=code, message="no room")
        life.host.message(session, wire_pb2.ClientMessage(failure=failure))
        told.extend(m.refusal for m in heard(session) if m.refusal.fatal)

    life.live(greeted(life), fail)
    assert [t.message for t in told] == [f"order o0 was given up: {code}: no room"]
    assert told[0].hint == f"{hint} and start this client again"
    life.die()


def heard(session: Session) -> list[wire_pb2.ServerMessage]:
    """All that waits to be written in a session."""
    parts = []
    while (message := session.out.peek()) is not None:
        parts.append(wire_pb2.ServerMessage.FromString(b"".join(message)))
        session.out.drop()
    return parts
