"""Compose: the three rules of a mix, on parts that exist nowhere but here."""

from collections.abc import Sequence

import pytest

from atoll.aggregation.compose import check, meaning
from atoll.protocols.errors import UsageError
from atoll.protocols.facts import Facts


def part(
    slot: str,
    name: str,
    needs: Sequence[str] = (),
    gives: Sequence[str] = (),
    refuses: Sequence[str] = (),
) -> Facts:
    return Facts(slot, name, frozenset(needs), frozenset(gives), frozenset(refuses))


PROXY = part("run", "run", gives=["proxy_data"])
LAW = part("aggregator", "law", needs=["proxy_data"])
ROUNDS = part("strategy", "rounds", gives=["rounds"])
BUFFER = part("strategy", "buffer", gives=["stale"])
VARIED = part("local algorithm", "varied", needs=["rounds"])
TOP = part("codec", "top", gives=["lossy", "sparse"])
MIDDLE = part("aggregator", "middle", refuses=["sparse"])
OFFERS = [ROUNDS, BUFFER, TOP, part("codec", "half", gives=["lossy"]), part("codec", "plain")]


def refused(*parts: Facts) -> UsageError:
    with pytest.raises(UsageError) as caught:
        check(parts, lambda: OFFERS)
    assert caught.value.code == "FL-S104"
    return caught.value


def test_a_need_that_another_part_or_the_run_gives_is_met() -> None:
    assert check([PROXY, LAW, ROUNDS, VARIED]) == []


def test_a_part_does_not_give_to_itself() -> None:
    with pytest.raises(UsageError):
        check([part("aggregator", "vain", needs=["rounds"], gives=["rounds"])])


def test_a_need_of_the_run_that_is_not_met() -> None:
    error = refused(part("run", "run"), LAW)
    assert error.message == (
        "aggregator law needs data of the server's own that is no part of its test set, "
        "which this run does not give"
    )


def test_a_need_that_another_part_of_the_slot_would_meet_names_it() -> None:
    error = refused(BUFFER, VARIED)
    assert error.message == (
        "local algorithm varied needs that all updates of a version were trained from the version "
        "before it, which strategy buffer does not give"
    )
    assert error.hint == "take strategy rounds"


def test_what_a_part_refuses_names_both_and_what_would_do() -> None:
    error = refused(ROUNDS, MIDDLE, TOP)
    assert error.message == (
        "aggregator middle cannot work with sparse updates, of which most values are 0, "
        "which codec top makes"
    )
    assert error.hint == "take another codec half or plain, or another aggregator"


def test_the_way_down_is_another_slot() -> None:
    down = part("codec down", "top", gives=["down_lossy", "down_sparse"])
    assert check([ROUNDS, MIDDLE, down]) == []


def test_words_of_a_users_own_only_have_to_meet() -> None:
    wants, has = (part("outer", "o", needs=["my_phase"]), part("strategy", "s", gives=["my_phase"]))
    assert check([wants, has]) == []
    assert refused(wants).message == "outer o needs my phase, which this run does not give"
    assert meaning("my_phase") == "my phase"


def sized(fewest: int, most: int | None) -> Facts:
    return Facts("strategy", "s", merges=(fewest, most))


RULE = Facts("aggregator", "rule", min_results=5)


def test_a_rule_gets_as_many_updates_as_it_needs_or_is_refused() -> None:
    assert check([sized(5, None), RULE]) == []
    assert check([sized(5, 5), RULE]) == []
    assert "never brings more than 4" in refused(sized(1, 4), RULE).message


def test_a_rule_that_now_and_then_has_too_few_is_a_warning() -> None:
    (warning,) = check([sized(4, None), RULE])
    assert warning.startswith("aggregator rule needs 5 updates for a version; strategy s may bring")


def test_sizes_that_are_not_known_are_not_judged() -> None:
    assert check([sized(1, 1), Facts("aggregator", "later")]) == []
    assert check([RULE]) == []
