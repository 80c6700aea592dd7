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
