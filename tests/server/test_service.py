"""What anyone may ask a server, and what it answers to nonsense."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from atoll.protocols import wire_pb2
from atoll.server.server import Server
from atoll.server.service import Service
from atoll.server.spec import RunSpec


class Refused(Exception):  # noqa: N818
    """What a call is ended with."""


class Context:
    async def abort(self, code: Any, message: str, metadata: Any) -> None:
        told = wire_pb2.Refusal.FromString(dict(metadata)["atoll-error-bin"])
        assert told.hint
        raise Refused(f"{told.code}: {told.message}")


async def asked(what: str, arguments: str) -> object:
    class Host:
        pass

    class Assembly:
        def lines(self, after: int, wait: float) -> object:
            return {"after": after, "wait": wait}

    server = Server.of(RunSpec("01HZX0000000000000000RVN00"), Path("nowhere"))
    server._assembly = Assembly()  # type: ignore[assignment]
    host = asyncio.get_running_loop().create_future()
    host.set_result(Host())
    service = Service(host, server._inspect)
    request = wire_pb2.InspectRequest(what=what, arguments=arguments)
    reply = await service.inspect(request.SerializeToString(), Context())
    return json.loads(reply.data)


def test_history_is_told_from_where_it_is_asked() -> None:
    found = asyncio.run(asked("history", '{"after": 7, "wait": 99}'))
    assert found == {"after": 7, "wait": 10.0}
    assert asyncio.run(asked("history", '{"after": -7}')) == {"after": 0, "wait": 0.0}


@pytest.mark.parametrize(
    "arguments",
    ["{", "[]", "7", '{"after": "x"}', '{"after": 1e400}', '{"after": null}', '{"wait": NaN}',
     '{"wait": "x"}', "[" * 100_000],
)  # fmt: skip
def test_arguments_that_are_none_are_refused(arguments: str) -> None:
    """Infinity and deep nesting ended in a traceback in the server's log."""
    with pytest.raises(Refused, match="FL-W101: "):
        asyncio.run(asked("history", arguments))


def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(Refused, match="FL-S108: cannot inspect 'all'"):
        asyncio.run(asked("all", ""))
