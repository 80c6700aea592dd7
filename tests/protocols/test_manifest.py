"""Manifest: both sides agree on every offset, or are told the first tensor where they do not."""

import json
import re

import pytest

from atoll.protocols.errors import RemoteError
from atoll.protocols.manifest import MAX_NUMEL, MAX_TENSORS, Manifest, TensorSpec

W = TensorSpec("w", (2, 3), "float32", "trainable")
MEAN = TensorSpec("mean", (3,), "float32", "buffers_float")
B = TensorSpec("b", (3,), "bfloat16", "trainable")
COUNT = TensorSpec("count", (), "int64", "buffers_other")
BASE = TensorSpec("base", (50,), "float32", "frozen")
MANIFEST = Manifest((W, MEAN, B, COUNT, BASE))


def test_counts_are_elements_per_group() -> None:
    assert MANIFEST.counts == {
        "trainable": 9,
        "buffers_float": 3,
        "buffers_other": 1,  # a scalar is one element
        "frozen": 50,
    }


def test_spans_lie_end_to_end_in_manifest_order() -> None:
    assert list(MANIFEST.spans("trainable")) == [(W, 0, 6), (B, 6, 9)]


def test_a_manifest_survives_json() -> None:
    assert Manifest.from_json(json.loads(json.dumps(MANIFEST.to_json()))) == MANIFEST


@pytest.mark.parametrize(
    "other",
    [
        (W, MEAN, B, COUNT),
        (MEAN, W, B, COUNT, BASE),
        (TensorSpec("w", (3, 2), "float32", "trainable"), MEAN, B, COUNT, BASE),
        (TensorSpec("w", (2, 3), "float16", "trainable"), MEAN, B, COUNT, BASE),
        (TensorSpec("w", (2, 3), "float32", "frozen"), MEAN, B, COUNT, BASE),
        (TensorSpec("v", (2, 3), "float32", "trainable"), MEAN, B, COUNT, BASE),
    ],
)
def test_the_schema_changes_with_anything_that_moves_an_offset(
    other: tuple[TensorSpec, ...],
) -> None:
    assert Manifest(other).schema != MANIFEST.schema
    assert MANIFEST.difference(Manifest(other)) != ""
    assert Manifest(MANIFEST.tensors).schema == MANIFEST.schema


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ((W, MEAN, B, COUNT), r"'base' \(50,\) is missing"),
        ((*MANIFEST.tensors, TensorSpec("x", (1,), "int8", "frozen")), "'x' .* is not in the run"),
        (
            (TensorSpec("w", (3, 2), "float32", "trainable"), MEAN, B, COUNT, BASE),
            r"'w' is \(3, 2\) float32 trainable, the run expects \(2, 3\) float32 trainable",
        ),
        ((MEAN, W, B, COUNT, BASE), "another order"),
    ],
)
def test_the_first_difference_is_named(other: tuple[TensorSpec, ...], told: str) -> None:
    assert re.search(told, MANIFEST.difference(Manifest(other)))


def spec(**change: object) -> dict[str, object]:
    return {"name": "w", "shape": [2], "dtype": "float32", "group": "trainable", **change}


REFUSED: dict[str, object] = {
    "not a list": {"tensors": []},
    "not an object": [["w", [2], "float32", "trainable"]],
    "a field missing": [{"name": "w", "shape": [2], "dtype": "float32"}],
    "a field too many": [spec(device="cuda")],
    "an empty name": [spec(name="")],
    "a path as name": [spec(name="../w")],
    "a line break in a name": [spec(name="w\n")],
    "a number as name": [spec(name=1)],
    "a negative size": [spec(shape=[-1])],
    "a bool as size": [spec(shape=[True])],
    "a float as size": [spec(shape=[2.0])],
    "a huge size": [spec(shape=[MAX_NUMEL + 1])],
    "huge by product": [spec(shape=[1 << 30, 1 << 30])],
    "huge by sum": [spec(name=n, shape=[MAX_NUMEL]) for n in "ab"],
    "too many dimensions": [spec(shape=[1] * 17)],
    "an unknown dtype": [spec(dtype="complex64")],
    "an unhashable dtype": [spec(dtype=["float32"])],
    "an unknown group": [spec(group="weights")],
    "a name twice": [spec(), spec()],
    "too many tensors": [None] * (MAX_TENSORS + 1),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_exactly_a_manifest_is_refused(case: str) -> None:
    with pytest.raises(RemoteError, match="malformed manifest") as caught:
        Manifest.from_json(REFUSED[case])
    assert caught.value.code == "FL-W101"
