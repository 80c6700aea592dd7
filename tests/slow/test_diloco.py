"""`fl-server demo --strategy diloco` on text: real processes, AdamW kept, outer Nesterov."""

import math
from pathlib import Path

import pytest

from atoll.client.topics import library_text
from atoll.server.history import History
from atoll.server.offline import history
from atoll.server.spec import RunSpec
from tests.slow.conftest import Federation

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "source", [pytest.param("text:{file},context=32", marks=pytest.mark.long), "topics:context=32"]
)
def test_the_demo_trains_a_transformer_on_characters(
    tmp_path: Path, federation: Federation, source: str
) -> None:
    file = tmp_path / "some.txt"
    file.write_text(library_text()[:60_000])
    out = tmp_path / "out"
    demo = federation.command(
        "demo", "fl-server", "demo", "--json", "--data", source.format(file=file),
        "--model", "charlm:width=32,depth=1", "--clients", "2", "--speeds", "4,4",
        "--out", str(out),
        "--strategy", "diloco:steps=15,rounds=4,dylu=false", "--target-accuracy", "0.99",
        "--timeout", "240",
    )  # fmt: skip
    assert demo.wait(300.0) == 5, demo.said()  # the target is out of reach, all else went well
    told = demo.told()["data"]
    assert told["versions"] == 4
    assert [client["steps"] for client in told["clients"]] == [60, 60]
    spec = RunSpec.read(out / "state" / "run.json")
    assert (spec.outer, spec.local["optimizer"]) == ("nesterov:lr=0.7,momentum=0.9", "adamw")
    assert losses(history(out / "state"))[-1] < losses(history(out / "state"))[0] - 0.5
    for name in ("client-0", "client-1"):
        assert (out / "clients" / name / "inner.safetensors").stat().st_size > 10_000


def losses(found: History) -> list[float]:
    made = [metrics["loss"] for _, _, metrics in sorted(found.evaluations, key=lambda e: e[1])]
    assert all(map(math.isfinite, made))
    return made
