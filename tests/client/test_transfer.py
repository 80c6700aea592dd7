"""Transfers of a line that was closed end as a lost connection does, in whatever call they are."""

from collections.abc import Callable

import pytest

from atoll.client import transfer
from atoll.client.line import BROKEN, Line
from atoll.protocols.blobs import BlobInfo, Section
from atoll.protocols.errors import ClientError
from atoll.protocols.messages import Result

INFO = BlobInfo("u-o1", 4, b"", (Section("trainable", "fp32", 1, 4),))


def fetch(line: Line) -> None:
    line.fetch(INFO, memoryview(bytearray(4)))


def send(line: Line) -> None:
    made = Result("o1", 0, 10, 320, 1.5, INFO, {})
    transfer.upload(line.bulk, line.token, line.run, made, memoryview(bytes(4)), line.patience)


@pytest.mark.parametrize("move", [fetch, send])
def test_a_transfer_of_a_closed_line_is_interrupted(move: Callable[[Line], None]) -> None:
    """gRPC raises a ValueError there: an upload ended in a traceback, an order in FL-S100."""
    line = Line(bulk=transfer.connect("127.0.0.1:1"))
    line.close()
    with pytest.raises(ClientError, match="FL-S208") as ended:
        move(line)
    assert ended.value.code in BROKEN


@pytest.mark.parametrize("move", [fetch, send])
def test_an_error_of_another_kind_is_not_taken_for_it(move: Callable[[Line], None]) -> None:
    line = Line(bulk=transfer.connect("127.0.0.1:1"))
    line.bulk.close()
    with pytest.raises(ValueError, match="Cannot invoke RPC"):
        move(line)
