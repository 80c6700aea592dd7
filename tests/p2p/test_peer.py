"""Peer: what it refuses before it says a word. The rest is tried with real processes."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atoll.p2p.invite import Invite
from atoll.p2p.peer import Peer
from atoll.p2p.work import Facts
from atoll.protocols.errors import PeerError
from tests.jumping import run
from tests.p2p.people import MANIFEST, entry_of, person

INVITE = Invite((), "01RUN", "0" * 64, b"f" * 32, b"s" * 32)
RUN = Facts(10, "names", "1" * 64)


@pytest.mark.parametrize("what", ["elements", "schema"])
def test_a_machine_that_makes_another_model_is_told_so(tmp_path: Path, what: str) -> None:
    here = Facts(**{**_plain(RUN), what: 11 if what == "elements" else "other"})
    closed: list[int] = []
    work: Any = SimpleNamespace(facts=here, close=lambda: closed.append(1))
    peer = Peer(tmp_path, INVITE, training=lambda manifest, me: work)
    hidden: Any = peer
    hidden._manifest, hidden._node = RUN, SimpleNamespace(id="Qm1")
    with pytest.raises(PeerError, match=f"{what} of the model") as refused:
        peer._made_work()
    assert refused.value.code == "FL-P408"
    assert closed


def test_a_member_takes_part_when_its_key_is_on_disk(tmp_path: Path) -> None:
    """Killed by a power cut between the two a peer could not tell any more what that one sealed."""
    peer = Peer(tmp_path, INVITE)
    one, two, keys = person(1), person(2), {"Qm1": "01" * 32}
    happened: list[object] = []
    hidden: Any = peer
    hidden._manifest = MANIFEST
    hidden._node = SimpleNamespace(id="Qm0")
    hidden._gate = SimpleNamespace(sealing=SimpleNamespace(keys=keys), me=entry_of(one))
    hidden._driver = SimpleNamespace(say=lambda event: happened.append(event.peer))
    hidden._memory = SimpleNamespace(keep_keys=happened.append)

    async def work() -> None:
        admitting = asyncio.create_task(peer._admit())
        peer._admitted(entry_of(one))
        await asyncio.sleep(1)
        peer._admitted(entry_of(one, speed=6.0))  # nothing new to keep
        await asyncio.sleep(1)
        keys["Qm2"] = "02" * 32
        peer._admitted(entry_of(two))
        await asyncio.sleep(1)
        admitting.cancel()

    run(work)
    first, both = {"Qm1": "01" * 32}, {"Qm1": "01" * 32, "Qm2": "02" * 32}
    assert happened == [first, one.id, one.id, both, two.id]


def _plain(facts: Facts) -> dict[str, Any]:
    return {"elements": facts.elements, "schema": facts.schema, "init": facts.init}
