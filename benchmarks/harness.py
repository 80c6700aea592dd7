"""Harness: what all benchmarks share: interleaved medians, one JSON line, exit 1 where short.

    python benchmarks/NAME.py [--quick]

The line has `bench, value, unit, rival, floor, ratio_to_floor, limit, ok, versions`. A limit is a
ratio to a floor measured in the same run (`ratio_to_floor <= limit`); where there is no floor it
bounds the value itself, from above or, for rates, from below. `--quick` ends within 50 seconds.
What is said besides goes to stderr.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Literal

PACKAGES = ("atoll", "torch", "numpy", "grpcio", "protobuf", "zlib-ng")


@dataclass(frozen=True, slots=True)
class Result:
    """What a benchmark found. `value`, `rival` and `floor` are in `unit`."""

    bench: str
    value: float
    unit: str
    limit: float
    floor: float | None = None
    rival: float | None = None  # the same work as others do it, here and now or as documented
    better: Literal["lower", "higher"] = "lower"
    ok: bool = True  # False: something else fell short, whatever the limit says
    more: Mapping[str, object] = field(default_factory=dict)  # further figures, in the same line

    @property
    def ratio(self) -> float | None:
        return self.value / self.floor if self.floor else None

    @property
    def passed(self) -> bool:
        held = self.value if self.ratio is None else self.ratio
        within = held <= self.limit if self.better == "lower" else held >= self.limit
        return self.ok and within

    def line(self) -> str:
        return json.dumps(
            {
                "bench": self.bench,
                "value": _short(self.value),
                "unit": self.unit,
                "rival": _short(self.rival),
                "floor": _short(self.floor),
                "ratio_to_floor": _short(self.ratio),
                "limit": self.limit,
                "ok": self.passed,
                "versions": versions(),
                **self.more,
            }
        )


def main(run: Callable[[bool], Result]) -> None:
    """Read `--quick`, run, print the line, exit 0 or 1."""
    parser = argparse.ArgumentParser(description=sys.modules[run.__module__].__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, within 50 s")
    result = run(parser.parse_args().quick)
    print(result.line(), flush=True)
    sys.exit(0 if result.passed else 1)


def say(text: str) -> None:
    """A remark for whoever watches."""
    print(text, file=sys.stderr, flush=True)


def interleaved(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case, taken in turn so that a slow minute of the machine hits all alike.

    One round before the first is not counted. What a case returns is called off the clock, where
    it can be called: to clean up.
    """
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(rounds + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            after = case()
            seconds = time.perf_counter() - start
            if callable(after):
                after()
            if round_:
                taken[name].append(seconds)
    return taken


def medians(taken: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def versions() -> dict[str, str]:
    """What ran, and on what."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    return found


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
