"""Links: which codecs a client gets, and what it may not ask for."""

import pytest

from atoll.protocols.blobs import Section
from atoll.protocols.codecset import Codecs
from atoll.protocols.codecspec import parse_ways
from atoll.protocols.errors import RemoteError, UsageError
from atoll.protocols.links import Allowed, Link
from atoll.protocols.manifest import Manifest

RUN = Allowed.of("bf16/fp16", "fp16")
ALL = ("fp32", "fp16", "bf16", "chain")


@pytest.mark.parametrize(
    ("asked", "can", "got"),
    [
        (Link(), ALL, Link("bf16", "fp16")),  # as the run wants
        (Link(), ("fp32", "fp16"), Link("fp16", "fp32")),  # the next best, and no chain
        (Link(), ("fp32",), Link("fp32", "fp32")),  # one that knows nothing else
        (Link(up="fp16"), ALL, Link("fp16", "fp16")),
        (Link("fp32", "fp32"), ALL, Link("fp32", "fp32")),  # is always allowed
    ],
)
def test_a_client_gets_what_it_asks_for_or_the_best_it_can(
    asked: Link, can: tuple[str, ...], got: Link
) -> None:
    assert RUN.agree(asked, can) == got


@pytest.mark.parametrize(
    ("asked", "can", "why"),
    [
        (Link(up="int8"), (*ALL, "int8"), "asks for up=int8, the run allows bf16 or fp16 or fp32"),
        (Link(up="fp16"), ("fp32",), "asks for up=fp16 and cannot fp16"),
        (Link(down="fp16"), ("fp32", "fp16"), "asks for down=fp16 and cannot chain"),
        (Link(), ("zip",), "the client can zip"),
        (Link(), (), "the client can nothing"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    asked: Link, can: tuple[str, ...], why: str
) -> None:
    with pytest.raises(RemoteError, match=why) as refused:
        RUN.agree(asked, can)
    assert refused.value.code == "FL-W108"
    assert refused.value.hint


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("bf16", ("bf16", "bf16")),
        ("up=bf16/fp32,down=fp16", ("bf16/fp32", "fp16")),
        ("down=fp16", ("fp32", "fp16")),
        ("up=m:C:a=1,b=2,down=bf16", ("m:C:a=1,b=2", "bf16")),
    ],
)
def test_one_codec_is_for_both_ways_or_each_way_has_its_own(
    text: str, pair: tuple[str, str]
) -> None:
    assert parse_ways(text).texts == pair


def test_a_way_that_is_none_is_named() -> None:
    with pytest.raises(UsageError) as wrong:
        parse_ways("sideways=bf16,up=bf16")
    assert wrong.value.code == "FL-S108"


def test_a_payload_is_read_by_the_codec_that_its_sections_name() -> None:
    codecs = Codecs(("bf16", "fp16"), Manifest(()))
    for name in ("bf16", "fp16", "fp32"):
        assert codecs.of([Section("trainable", name, 4, 8)]) is codecs[name]
    with pytest.raises(RemoteError) as strange:
        codecs.of([Section("trainable", "zip", 4, 8)])
    assert strange.value.code == "FL-W104"
