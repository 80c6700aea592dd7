"""A process's interpreter while its loop serves, and after."""

import gc
import sys

import pytest

from atoll.protocols.prompt import SWITCH, prompt


def test_it_is_undone_whatever_ends_it() -> None:
    before = sys.getswitchinterval()
    found: list[float] = []

    def serve() -> None:
        with prompt():
            found.extend((sys.getswitchinterval(), gc.get_freeze_count()))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        serve()
    assert found[0] == pytest.approx(SWITCH)
    assert found[1] > 10_000
    assert sys.getswitchinterval() == pytest.approx(before)
    assert gc.get_freeze_count() == 0


def test_of_two_in_one_process_the_first_undoes_it() -> None:
    before = sys.getswitchinterval()
    first, second = prompt(), prompt()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert sys.getswitchinterval() == pytest.approx(before)
