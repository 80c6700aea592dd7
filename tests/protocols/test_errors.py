"""The catalogue: every code has an exit code a shell can keep, and a page that says the same."""

import re
from pathlib import Path

import pytest

from atoll.protocols import errors
from atoll.protocols.errors import CATALOGUE, AtollError, Entry, RefusedError, RemoteError

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"

KEPT_BY_A_SHELL = {0, 1, 2, 3, 4, 5, 6, 9, 64, 69, 73, 74, 75, 76, 77, 78, 130, 143}


def sections() -> dict[str, Entry]:
    """docs/errors.md, read back: code -> what its section says."""
    found = re.findall(
        r"^## (FL-\w+)\n\n\*\*(.+)\*\* · exit code (\d+)\n\n\S", PAGE.read_text(), re.MULTILINE
    )
    assert len(found) == len({code for code, _, _ in found}), "a section stands twice"
    return {code: Entry(int(number), title) for code, title, number in found}


def test_the_page_has_a_section_for_every_code_and_no_other() -> None:
    assert sections() == CATALOGUE


@pytest.mark.parametrize("code", CATALOGUE)
def test_codes_are_well_formed_and_exit_codes_are_documented_ones(code: str) -> None:
    assert re.fullmatch(r"FL-[SCPWD][1-9]\d\d", code)
    assert CATALOGUE[code].exit_code in KEPT_BY_A_SHELL - {0}


def test_an_error_knows_its_exit_code_and_its_page() -> None:
    error = AtollError("FL-W104", "tensor 'w' is (2,)", "give the run's model")
    assert (error.exit_code, error.docs) == (76, "docs/errors.md#fl-w104")
    assert str(error) == "FL-W104: tensor 'w' is (2,) (give the run's model)"
    assert str(AtollError("FL-S208", "interrupted")) == "FL-S208: interrupted"


def test_a_code_from_a_newer_release_is_exit_1() -> None:
    assert AtollError("FL-S999", "unknown here").exit_code == 1


def test_what_they_did_wrong_and_what_you_did_wrong_are_different_types() -> None:
    kinds = [
        k for k in vars(errors).values() if isinstance(k, type) and k.__name__.endswith("Error")
    ]
    theirs = {k for k in kinds if issubclass(k, RemoteError)}
    yours = set(kinds) - theirs - {AtollError}
    assert RefusedError in theirs
    assert len(yours) >= 5
    assert all(k.__base__ is AtollError for k in yours)
