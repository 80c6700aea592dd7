"""Results that come inline, in the session that they come in."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from atoll.protocols.errors import RemoteError
from atoll.protocols.messages import Result
from tests.server.test_standing import greeted
from tests.server.test_workshop import Life


def inline(life: Life, digest: bytes) -> None:
    order = str(life.order())
    info, data = life.packed(order, 0.25)
    result = Result(order, 0, 1, 1, 0.1, replace(info, sha256=digest), inline=data)
    life.host.intake.inline(life.host.sessions.of["c"], result)


def test_an_inline_payload_with_another_digest_is_refused(tmp_path: Path) -> None:
    """Whatever had become of it on its way, it got into the model: the digest was not looked at."""
    life = Life(tmp_path)
    refused: list[RemoteError] = []

    async def damaged() -> None:
        await life.until(lambda: life.order() is not None)
        with pytest.raises(RemoteError) as raised:
            inline(life, bytes(31) + b"\1")
        refused.append(raised.value)

    life.live(greeted(life), damaged)
    assert refused[0].code == "FL-W105"
    assert life.host.membership.members["c"].standing == "left"
    assert life.assembly.workshop.uploads.stored("o0.0") is None
    life.die()


@pytest.mark.parametrize("told", [True, False])
def test_one_with_its_digest_or_none_is_taken(tmp_path: Path, told: bool) -> None:
    life = Life(tmp_path)

    async def whole() -> None:
        await life.until(lambda: life.order() is not None)
        data = life.packed(str(life.order()), 0.25)[1]
        inline(life, hashlib.sha256(data).digest() if told else b"")
        await life.until(lambda: life.host.run.published == 1)

    life.live(greeted(life), whole)
    life.die()
