"""Every command and program in README.md and docs/ works, in the order in which it is read.

The conventions of those pages: a block ```sh is run by bash at the root of a checkout, a command
that fails fails the page. Where a block has lines `# terminal 1`, `# terminal 2`, ..., what follows
each is run in a shell of its own, side by side. A block ```python whose first line is `# name.py`
is kept under that name for later blocks; any other is run. Shown only: ```console and ```text.

Pages are read side by side, one for each core: most of their time is Python's start and torch's.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
NOT_RUN = ("make setup", "make demo", "make test")  # CI does these
PORT = "7447"  # the default; tests that run at the same time must not meet there
SECONDS = 120.0  # a block may take

BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / page).read_text())


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return reader(tmp_path)


def reader(folder: Path) -> Path:
    """What a reader has: the examples, and .venv/bin."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(BIN)
    return folder


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return str(taken.getsockname()[1])


def terminals(block: str) -> list[str]:
    """The scripts of a block that run side by side."""
    parts = re.split(r"^# terminal \d+.*\n", block, flags=re.MULTILINE)
    return [part for part in parts if part.strip()]


def prepared(script: str, port: str) -> str:
    """`script` without what is not run, on a port of its own."""
    kept = [line for line in script.splitlines() if not line.startswith(NOT_RUN)]
    text = "\n".join(kept).replace(PORT, port)
    return re.sub(
        r"fl-server start(?!.*--listen)", f"fl-server start --listen 127.0.0.1:{port}", text
    )


def run(commands: list[list[str]], folder: Path) -> None:
    """All at once; each must end well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    running: list[subprocess.Popen[bytes]] = []
    codes: list[int | None]
    try:
        for i, command in enumerate(commands):
            with (folder / f"said-{i}").open("wb") as said:
                started = subprocess.Popen(
                    command, cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
            running.append(started)
        end = time.monotonic() + SECONDS
        while True:  # where a server fails, its clients would wait for it for ever
            codes = [process.poll() for process in running]
            if any(codes) or None not in codes or time.monotonic() > end:
                break
            time.sleep(0.05)
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    texts = [(folder / f"said-{i}").read_text() for i in range(len(commands))]
    told = "\n".join(
        f"exit code {code}:\n{command[-1]}\n{text[-3000:]}"
        for command, code, text in zip(commands, codes, texts, strict=True)
    )
    assert not any(codes), told
    assert None not in codes, f"still going on after {SECONDS} s\n{told}"


@pytest.fixture(scope="module")
def reading(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    """Every page that was asked for, being read."""
    here = [item for item in request.session.items if item.path == request.path]
    asked = [item.callspec.params["page"] for item in here if hasattr(item, "callspec")]
    with ThreadPoolExecutor(os.cpu_count() or 1) as readers:
        yield {
            page: readers.submit(read, page, reader(tmp_path_factory.mktemp("reader")))
            for page in asked
        }


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_what_a_page_shows_works(page: str, reading: dict[str, Future[None]]) -> None:
    reading[page].result()


def read(page: str, checkout: Path) -> None:
    """Do what the page says, from its beginning to its end."""
    port = free_port()
    for language, block in blocks(page):
        named = re.match(r"# (\w+\.py)\n", block)
        if language == "python" and named:
            (checkout / named[1]).write_text(block)
        elif language == "python":
            run([[sys.executable, "-c", block]], checkout)
        else:
            scripts = [prepared(script, port) for script in terminals(block)]
            wanted = [["bash", "-euo", "pipefail", "-c", s] for s in scripts if s.strip()]
            run(wanted, checkout)


def test_a_command_that_fails_fails_its_page(checkout: Path) -> None:
    with pytest.raises(AssertionError, match="exit code 3"):
        run([["bash", "-c", "exit 3"], ["bash", "-c", "exit 0"]], checkout)


def test_terminals_are_run_side_by_side_and_make_lines_left_out() -> None:
    block = "make setup\n# terminal 1\nfl-server start\n# terminal 2: a client\nfl-client x:7447\n"
    scripts = [prepared(script, "1") for script in terminals(block)]
    assert scripts == ["", "fl-server start --listen 127.0.0.1:1", "fl-client x:1"]
