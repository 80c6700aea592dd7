"""Peer: what it refuses before it says a word. The rest is tried with real processes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atoll.p2p.invite import Invite
from atoll.p2p.peer import Peer
from atoll.p2p.work import Facts
from atoll.protocols.errors import PeerError

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


def _plain(facts: Facts) -> dict[str, Any]:
    return {"elements": facts.elements, "schema": facts.schema, "init": facts.init}
