"""Places: a path that can never be one is refused, and nothing but a file is replaced by one."""

import os
from pathlib import Path

import pytest

from atoll.protocols import places
from atoll.protocols.errors import UsageError


def test_a_file_goes_to_its_path_or_where_a_link_leads(tmp_path: Path) -> None:
    there, link, loose = tmp_path / "there", tmp_path / "link", tmp_path / "loose"
    there.touch()
    link.symlink_to("there")
    loose.symlink_to("not-yet")
    assert places.target(tmp_path / "new") == tmp_path / "new"
    assert places.target(there) == places.target(link) == there
    assert places.target(loose) == tmp_path / "not-yet"


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a pipe", "link to itself"])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe")
    else:
        path.symlink_to("it")
    with pytest.raises(UsageError, match=f"cannot write {path}: ") as refused:
        places.target(path)
    assert (refused.value.code, refused.value.hint) == ("FL-S108", "name another file")


def test_what_stands_where_a_folder_is_to_be_is_told(tmp_path: Path) -> None:
    """`File exists` sounded like good news."""
    loose, pipe, below = tmp_path / "loose", tmp_path / "pipe", tmp_path / "file" / "folder"
    loose.symlink_to("not-there")
    os.mkfifo(pipe)
    (tmp_path / "file").touch()
    told = {}
    for path in (loose, pipe, below):
        with pytest.raises(OSError) as wrong:  # noqa: PT011  # what it says is what is tested
            path.mkdir(parents=True, exist_ok=True)
        told[path.name] = places.plainly(wrong.value)
    assert told == {
        "loose": "it is a link to nothing",
        "pipe": "it is there, and is no folder",
        "folder": "Not a directory",
    }
    assert places.plainly(OSError("all by itself")) == "all by itself"
