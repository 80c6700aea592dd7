"""The demo: what it tells of a process that died."""

from pathlib import Path

import pytest

from atoll.protocols.children import Child
from atoll.server.demo import failure_of

SAYS = "error FL-S202: a server is there\n  fix    stop it\n  docs   docs/errors.md#fl-s202"


@pytest.mark.parametrize(
    ("ends", "code", "said", "hint"),
    [
        (f"sys.exit({SAYS!r})", "FL-S202", "a server is there", "stop it"),
        ("sys.exit(74)", "FL-S203", "its disk is full", "another --out"),  # it was FL-S204
        ("sys.exit(1)", "FL-S204", "the server ended", "server.log"),
    ],
)
def test_what_a_process_said_before_it_died_is_the_demos_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, code: str, said: str, hint: str
) -> None:
    (tmp_path / "dies.py").write_text(f"import sys\n{ends}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child = Child("server", "dies", (), tmp_path / "logs")
    child.start()
    child.wait(30)
    error = failure_of(child, "the server ended")
    assert error.code == code
    assert said in error.message
    assert hint in error.hint
    child.close()
