"""What all tests share: the same random examples every time, `--rewrite`, a package to install."""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import settings

from atoll.protocols import slots

settings.register_profile("atoll", derandomize=True, database=None, deadline=None)
settings.load_profile("atoll")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite", action="store_true", help="write tests/transcripts/*.txt anew from the code"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The slow ones are not even imported where none is wanted."""
    return (collection_path.name == "slow" and config.option.markexpr == "not slow") or None


def pytest_sessionstart() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """What is imported now stays: the collector, which takes 0.3 s to go through it, lets it be."""
    gc.freeze()
    gc.enable()


class Logged(logging.Handler):
    """The messages of a logger while a test runs."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += f"{record.getMessage()}\n"


@pytest.fixture
def logged() -> Iterator[Logged]:
    """What this package logs. (pytest's own `caplog` is switched off: before each of a test's three
    phases it goes through the 42 loggers of torch, a ninth of the time of all fast tests.)"""
    logger, handler = logging.getLogger("atoll"), Logged()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.setLevel(before)
    logger.removeHandler(handler)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of what was made durable, as they were then, in order."""
    seen: list[str] = []
    for call in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, call, lambda fd: seen.append(os.readlink(f"/proc/self/fd/{fd}")))
    return seen


class Package(Protocol):
    """`points`: group (without "atoll.") to its lines of entry_points.txt."""

    def __call__(self, name: str, code: str, **points: str) -> None: ...


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """Puts a module where imports find it, with what an installer writes beside it."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, code: str, **points: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        groups = [f"[atoll.{group}]\n{lines}\n" for group, lines in points.items()]
        (info / "entry_points.txt").write_text("\n".join(groups))
        monkeypatch.delitem(sys.modules, name, raising=False)
        slots.forget_installed()

    yield install
    slots.forget_installed()
