"""Nodes over real hivemind: two that know each other, and how tests of nodes are marked."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from atoll.p2p.node import Node

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)

MARKS = [
    pytest.mark.slow,
    # hivemind leaves connections to a daemon that is gone to the garbage collector
    pytest.mark.usefixtures("collected"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@asynccontextmanager
async def pair(folder: Path) -> AsyncIterator[tuple[Node, Node]]:
    first = Node(folder / "a", listen=LOOPBACK)
    await first.start()
    second = Node(folder / "b", listen=LOOPBACK, bootstrap=await first.addresses())
    try:
        await second.start()
        yield first, second
    finally:
        await second.stop()
        await first.stop()
