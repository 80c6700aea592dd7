"""What a server tells of its run is read strictly: nothing of it is trusted."""

import json
from typing import Any

import pytest

from atoll.protocols.errors import RemoteError
from atoll.protocols.manifest import Manifest, TensorSpec
from atoll.protocols.runinfo import RunInfo
from atoll.server.spec import RunSpec

MANIFEST = Manifest((TensorSpec("w", (2, 3), "float32", "trainable"),))
SPEC = RunSpec("01HZX0000000000000000RVN00", local={"lr": 0.1, "clip": 1, "amp": True}, seed=3)


def told(**fields: Any) -> dict[str, Any]:
    return {**json.loads(SPEC.for_clients()), "manifest": MANIFEST.to_json(), **fields}


def test_what_a_server_says_is_what_a_client_reads() -> None:
    info = RunInfo.of(told())
    assert (info.id, info.model, info.data, info.seed) == (SPEC.id, SPEC.model, SPEC.data, 3)
    assert (info.local, info.algorithm, info.name) == (SPEC.local, SPEC.algorithm, SPEC.name)
    assert (info.codec_up, info.codec_down) == (SPEC.codec_up, SPEC.codec_down)
    assert info.manifest == MANIFEST


def test_a_server_that_asks_for_no_validators_need_not_say_so() -> None:
    assert RunInfo.of(told()).validate == 0
    assert RunInfo.of(told(validate=0.1)).validate == 0.1


def test_what_is_unknown_is_passed_over() -> None:
    assert RunInfo.of(told(colour="red")) == RunInfo.of(told())


@pytest.mark.parametrize("name", sorted(told()))
def test_nothing_may_be_missing(name: str) -> None:
    given = told()
    del given[name]
    refused(given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", 5), ("name", None), ("model", "m" * 1001), ("data", ["digits"]), ("algorithm", {}),
        ("codec_up", 1.5), ("codec_down", True), ("seed", "0"), ("seed", 1.5), ("seed", True),
        ("local", []), ("local", {"lr": None}), ("local", {"lr": [1]}), ("local", {"lr": {}}),
        ("local", {"lr": float("nan")}), ("local", {"lr": float("inf")}),
        ("validate", 1.0), ("validate", -0.1), ("validate", float("nan")), ("validate", "0.1"),
        ("manifest", [{"name": "w"}]), ("manifest", "w"), ("manifest", None),
    ],
)  # fmt: skip
def test_nothing_may_be_of_another_kind(name: str, value: object) -> None:
    refused(told(**{name: value}))


@pytest.mark.parametrize("given", [None, [], "run", 5])
def test_what_is_no_object_is_refused(given: Any) -> None:
    refused(given)


def refused(given: Any) -> None:
    with pytest.raises(RemoteError) as error:
        RunInfo.of(given)
    assert error.value.code == "FL-W101"
    assert len(error.value.message) <= 300
    assert error.value.hint
