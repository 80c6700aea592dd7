"""Codec specs: what is written is what is made, and what cannot be is refused in one sentence."""

import pytest

from atoll.protocols.codecs import codec
from atoll.protocols.codecspec import (
    OFFERED,
    Chain,
    ErrorFeedback,
    from_remote,
    known,
    parse,
    parse_ways,
)
from atoll.protocols.errors import RemoteError, UsageError


@pytest.mark.parametrize(
    ("text", "chain"),
    [
        ("int8", Chain("int8")),
        (" int8 : block = 256 ", Chain("int8", params=(("block", 256),))),
        ("topk:0.01+ef", Chain("topk", (0.01,), feedback=ErrorFeedback())),
        ("topk:fraction=1e-2", Chain("topk", params=(("fraction", 0.01),))),
        ("topk:0.5,bits=2+zstd:7", Chain("topk", (0.5,), (("bits", 2),), zstd=7)),
        ("powersgd:4+ef+zstd", Chain("powersgd", (4,), feedback=ErrorFeedback(), zstd=3)),
        ("int8+zstd:level=9+ef", Chain("int8", feedback=ErrorFeedback(), zstd=9)),
        ("sign+ef:0.9", Chain("sign", feedback=ErrorFeedback(0.9))),
        ("sign+ef:0.95,10", Chain("sign", feedback=ErrorFeedback(0.95, 10))),
        ("sign+ef:reset=10", Chain("sign", feedback=ErrorFeedback(1.0, 10))),
        ("my.mod:Own", Chain("my.mod:Own")),
        ("my.mod:Own.nested:0.5,x-y=true", Chain("my.mod:Own.nested", (0.5,), (("x_y", True),))),
    ],
)
def test_a_spec_is_a_codec_with_its_parameters_and_what_stands_around_it(
    text: str, chain: Chain
) -> None:
    assert parse(text) == chain
    assert parse(chain.text) == chain


@pytest.mark.parametrize(
    ("text", "up", "down"),
    [
        ("bf16", "bf16", "bf16"),
        ("topk:0.01+ef", "topk:0.01+ef", "topk:0.01"),
        ("up=topk:0.01+ef,down=int8", "topk:0.01+ef", "int8"),
        ("up=topk:0.01,bits=2+ef:0.9,8,down=int8", "topk:0.01,bits=2+ef:decay=0.9,reset=8", "int8"),
        ("down = int8", "fp32", "int8"),
        ("up=fp16", "fp16", "fp32"),
        ("up=topk:0.01+ef/int8,down=int8/bf16", "topk:0.01+ef/int8", "int8/bf16"),
        ("topk+ef/int8", "topk+ef/int8", "topk/int8"),
    ],
)  # fmt: skip
def test_ways_are_one_chain_for_both_or_one_for_each(text: str, up: str, down: str) -> None:
    ways = parse_ways(text)
    assert ways.texts == (up, down)


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("", "FL-S108", "is no name"),
        ("+ef", "FL-S108", "is no name"),
        ("ef", "FL-S108", "ef stands around a codec"),
        ("int8+ef+ef", "FL-S108", "ef stands twice"),
        ("int8+zstd+zstd", "FL-S108", "zstd stands twice"),
        ("int8+gzip", "FL-S108", "+gzip is unknown"),
        ("fp32+ef", "FL-S108", "loses nothing"),
        ("fp32+zstd", "FL-S108", "what was quantised"),
        ("int8+zstd:0", "FL-S102", "takes a level"),
        ("int8+zstd:3,4", "FL-S102", "takes a level"),
        ("int8+zstd:size=4", "FL-S102", "takes a level"),
        ("int8+zstd:level=fast", "FL-S102", "takes a level"),
        ("int8+ef:0", "FL-S102", "decay=0"),
        ("int8+ef:1.5", "FL-S102", "decay=1.5"),
        ("int8+ef:reset=0.5", "FL-S102", "reset=0.5"),
        ("int8+ef:reset=inf", "FL-S102", "reset=inf"),
        ("int8+ef:nan", "FL-S102", "decay=nan"),
        ("int8+ef:beta=1", "FL-S102", "ef takes decay and reset"),
        ("int8+ef:1,2,3", "FL-S102", "ef takes decay and reset"),
        ("int8+ef:much", "FL-S102", "decay=much"),
        ("topk:", "FL-S108", "is no parameter"),
        ("topk:0.1,bits=", "FL-S108", "is no parameter"),
        ("topk:bits=2,0.1", "FL-S108", "is no parameter"),
        ("topk:bits=2,bits=16", "FL-S108", "is no parameter"),
        ("os;rm", "FL-S108", "is no name"),
        ("x" * 201, "FL-S108", "at most 200"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(text: str, code: str, says: str) -> None:
    with pytest.raises(UsageError, match=says.replace("+", r"\+")) as caught:
        parse(text)
    assert caught.value.code == code
    assert caught.value.hint


@pytest.mark.parametrize(
    "text", ["up=int8,up=int8", "up=int8,down=topk+ef", "int8,up=int8", "up=int8//bf16"]
)
def test_ways_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"twice|way down|stands before|is no name"):
        parse_ways(text)


def test_a_client_may_ask_for_one_way_only() -> None:
    assert parse_ways("", "").texts == ("", "")
    assert parse_ways("up=int8", "").texts == ("int8", "")


def test_a_chain_says_what_a_client_must_be_able_to() -> None:
    assert parse("topk:0.01+ef+zstd").needs == ("topk", "ef", "zstd")
    assert parse("fp32").needs == ("fp32",)
    assert set(parse("topk+ef").needs) <= set(OFFERED)


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="'tokp'") as caught:
        known(parse("tokp:0.1"))
    assert caught.value.code == "FL-S101"
    assert "did you mean 'topk'" in caught.value.hint


@pytest.mark.parametrize("text", ["topk:0.01+ef", "int8:block=64", "fp32"])
def test_a_servers_choice_is_taken_where_it_is_known_here(text: str) -> None:
    assert from_remote(text) == parse(text)


@pytest.mark.parametrize(
    "text", ["os:system", "os:system:ls", "nonsense", "", "int8+gzip", "x" * 999]
)
def test_nothing_is_imported_because_the_other_side_says_so(text: str) -> None:
    with pytest.raises(RemoteError) as caught:
        from_remote(text)
    assert caught.value.code == "FL-W108"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int8:block=7", "multiple of 8"),
        ("int8:block=true", "is no number"),
        ("int8:block=1000000", "multiple of 8"),
        ("topk:0", "part to keep"),
        ("topk:1.5", "part to keep"),
        ("topk:fast", "part to keep"),
        ("topk:0.1,bits=8", "2, 16, 32"),
        ("topk:0.1,depth=8", "depth"),
        ("fp16:3", "takes no arguments"),
    ],
)
def test_parameters_are_checked_where_the_codec_is_made(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        codec(text)
    assert caught.value.code == "FL-S102"
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["int8", "int8:block=64", "topk:0.01", "topk:0.5,bits=2"])
def test_a_codecs_name_makes_it_again(text: str) -> None:
    assert codec(text).name == text
    assert codec(codec(text).name).name == text


def test_an_object_that_is_not_called_takes_no_parameters() -> None:
    with pytest.raises(UsageError, match="takes no parameters"):
        codec("sys:version_info:1")


def test_an_object_that_is_made_already_is_taken_as_it_is() -> None:
    assert codec("atoll.protocols.codecs:FP32").name == "fp32"
