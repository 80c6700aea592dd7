"""Before a server can serve: what its disk refuses is one error, and nothing is left running."""

import errno
import gc
from pathlib import Path

import pytest

from atoll.protocols.errors import ServerError
from atoll.server.server import Server


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_is_full_at_the_start_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It did not say which file, and the open port went down with a traceback."""
    write = Path.write_text

    def full(path: Path, text: str) -> int:
        if path.name == "server.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, text)

    server = Server("linear", data="digits", folder=tmp_path / "state")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ServerError, match=r"server\.json cannot be written: No space") as refused:
        server.run("127.0.0.1:0")
    assert refused.value.code == "FL-S203"
    gc.collect()


def test_a_note_that_cannot_be_removed_hides_no_error(tmp_path: Path) -> None:
    """What the server had to say was lost in an FL-S100, and its lock stayed."""
    folder = tmp_path / "state"
    server = Server("linear", data="digits", folder=folder)
    (folder / "server.json").mkdir(parents=True)
    with pytest.raises(ServerError, match=r"FL-S203: .*server\.json cannot be written"):
        server.run("127.0.0.1:0")
