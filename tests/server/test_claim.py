"""A run takes no folder that is somebody else's, and leaves none behind that it could not use."""

import contextlib
import fcntl
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from atoll.protocols import console
from atoll.protocols.errors import ServerError
from atoll.server.cli import cli
from atoll.server.door import beginning, locked
from atoll.server.spec import RunSpec, open_spec

SPEC = RunSpec("01HZX0000000000000000RVN00")


def begin(folder: Path, code: str, *further: str) -> None:
    """Begin a run that fails with `code` after it has made these files."""
    with pytest.raises(ServerError):
        fail(folder, ServerError(code, "no", "mend it"), *further)


def fail(
    folder: Path, error: BaseException, *further: str, meanwhile: Callable[[], object] = int
) -> None:
    with beginning(folder, SPEC.id):
        open_spec(folder, SPEC)
        for name in further:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("x")
        meanwhile()
        raise error


def test_a_run_that_cannot_begin_leaves_nothing_behind(tmp_path: Path) -> None:
    """Also no folder above it; and what a start has made by then goes with it."""
    begin(tmp_path / "a" / "b", "FL-S201")
    begin(
        tmp_path / "a" / "b", "FL-S102", "lock", "server.json", "journal.sqlite",
        "journal.sqlite-wal", "journal.sqlite-shm", "history.jsonl",
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays_empty(tmp_path: Path) -> None:
    begin(tmp_path, "FL-S201", "lock")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_before_the_first_version_leaves_nothing(
    tmp_path: Path, stop: type[BaseException]
) -> None:
    with pytest.raises(stop):
        fail(tmp_path / "s", stop())
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_a_version_stays_and_so_does_another_servers(tmp_path: Path) -> None:
    begin(tmp_path / "begun", "FL-S204", "versions/0")
    assert (tmp_path / "begun" / "run.json").exists()
    begin(tmp_path / "taken", "FL-S202", "lock")
    assert (tmp_path / "taken" / "run.json").exists()
    SPEC.write(tmp_path / "run.json")  # of an earlier start, which made no version
    begin(tmp_path, "FL-S201")
    assert (tmp_path / "run.json").exists()


def test_what_cannot_be_removed_hides_nothing(tmp_path: Path) -> None:
    """The error is the start's own, not that of tidying up."""
    begin(tmp_path / "s", "FL-S201", "journal.sqlite-wal/in-the-way")
    assert (tmp_path / "s" / "journal.sqlite-wal").exists()


def test_a_run_that_another_server_took_up_meanwhile_stays(tmp_path: Path) -> None:
    """Of two that began at once, the one that failed took the other's run.json away: what that
    one had trained could neither be read nor continued."""
    folder = tmp_path / "s"
    with contextlib.ExitStack() as other:
        with pytest.raises(KeyboardInterrupt):
            fail(folder, KeyboardInterrupt(), meanwhile=lambda: other.enter_context(locked(folder)))
        assert (folder / "run.json").exists()
    (folder / "run.json").unlink()
    theirs = replace(SPEC, id="01HZX0000000000000000RVN01")
    with pytest.raises(KeyboardInterrupt):
        fail(folder, KeyboardInterrupt(), meanwhile=lambda: theirs.write(folder / "run.json"))
    assert RunSpec.read(folder / "run.json") == theirs


def test_a_run_is_not_begun_where_another_server_is_beginning(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ServerError, match="which is starting") as refused:
        open_spec(tmp_path, SPEC)
    assert refused.value.code == "FL-S202"
    assert not (tmp_path / "run.json").exists()
    assert open_spec(tmp_path, SPEC) == SPEC


def test_of_two_that_begin_at_once_the_second_goes_on_with_the_firsts_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = replace(SPEC, id="01HZX0000000000000000RVN01")

    class Late(locked):
        def __enter__(self) -> None:
            theirs.write(tmp_path / "run.json")
            super().__enter__()

    monkeypatch.setattr("atoll.server.spec.locked", Late)
    assert open_spec(tmp_path, SPEC) == theirs


def test_a_lock_that_was_removed_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opened it before must not take it for the one that is there now."""
    flock = fcntl.flock
    calls: list[int] = []

    def late(fd: int, how: int) -> None:
        if not calls:
            (tmp_path / "lock").unlink()
        calls.append(fd)
        flock(fd, how)

    monkeypatch.setattr("fcntl.flock", late)
    with locked(tmp_path):
        assert len(calls) == 2
        with pytest.raises(ServerError), locked(tmp_path):
            pass


@pytest.mark.parametrize("foreign", ["thesis.tex", "journal.sqlite", "versions"])
def test_a_folder_with_something_in_it_is_no_state_directory(
    tmp_path: Path, foreign: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run once began among somebody's files without a word."""
    (tmp_path / foreign).write_text("x")
    assert console.run(cli, ["start", "--state", str(tmp_path), "--json"]) == 4
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "FL-S109"
    assert f"{tmp_path} is not empty and holds no run: {foreign}" == error["message"]
    assert [p.name for p in tmp_path.iterdir()] == [foreign]


def test_many_foreign_files_are_not_all_named(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / name).touch()
    with pytest.raises(ServerError, match=r": a, b, c, \.\.\. \("):
        open_spec(tmp_path, SPEC)


def test_what_every_disk_or_an_earlier_start_has_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "lock").touch()
    (tmp_path / "run.json.tmp").touch()  # killed in its first moment
    assert open_spec(tmp_path, SPEC) == SPEC


def test_a_file_is_no_state_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServerError) as refused:
        open_spec(tmp_path / "file", SPEC)
    assert refused.value.code == "FL-S206"
