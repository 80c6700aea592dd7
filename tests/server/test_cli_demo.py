"""What a demo says when it is over."""

from pathlib import Path
from typing import Any

import pytest

from atoll.protocols import console
from atoll.server.cli import cli
from atoll.server.cli_demo import _ending
from atoll.server.demo import DemoSpec


def told(clients: int, epsilon: float | None = None) -> dict[str, Any]:
    one = {"updates": 7, "steps": 350, "bytes_up": 1183, "bytes_down": 134_680}
    return {
        "reached": True, "seconds_to_target": 4.88, "versions": 9, "accuracy": 0.9582,
        "bytes_up": 1183 * clients, "bytes_down": 134_680 * clients, "epsilon": epsilon,
        "files": {"model": "out/model.safetensors"},
        "clients": [{"name": f"client-{i}", **one} for i in range(clients)],
    }  # fmt: skip


def spec(clients: int) -> DemoSpec:
    return DemoSpec(
        clients, (1.0,) * clients, "fedcompass", "digits", "mlp", "iid", 0.95, 60.0, 0, Path("out")
    )


def test_bytes_are_told_of_all_and_of_each() -> None:
    lines = _ending(spec(2), told(2)).splitlines()
    assert lines[:5] == [
        "reached 0.95 accuracy after 4.9 s of training (9 versions, best 0.9582)",
        "2.4 kB up, 269 kB down",
        "  client-0      7 updates     350 steps    1.2 kB up   135 kB down",
        "  client-1      7 updates     350 steps    1.2 kB up   135 kB down",
        "",
    ]


def test_of_a_crowd_the_sums_are_told_and_of_noise_the_price() -> None:
    lines = _ending(spec(13), told(13, 2.1312)).splitlines()
    assert lines[1:3] == ["15.4 kB up, 1.8 MB down, epsilon 2.131", ""]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--max-epsilon", "2"), "FL-S108"),
        (("--dp", "clip=0"), "FL-S102"),
        (("--local-dp", "noise=-1"), "FL-S102"),
        (("--dp", "clip=1", "--aggregator", "fedlaw"), "FL-S104"),
    ],
)
def test_noise_that_cannot_be_is_refused_before_anything_starts(
    options: tuple[str, ...], code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert console.run(cli, ["demo", "--out", str(out), *options, "--json"]) != 0
    assert code in capsys.readouterr().out
    assert not out.exists()
