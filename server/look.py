"""Look: where a run stands now, and what happens in it next, over the wire or from its files."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from atoll.protocols import console
from atoll.protocols.address import split as split_address
from atoll.protocols.errors import ClientError, ServerError
from atoll.server import offline
from atoll.server.door import held, read_note
from atoll.server.history import History, parse
from atoll.server.live import Live, LiveView, State, view
from atoll.server.spec import RunSpec
from atoll.server.status import Status
from atoll.server.totals import Row

ANSWER = 30.0  # seconds a server may take: it accepts first, then imports torch on a busy machine
WORD = 2.0  # seconds after which whoever waits is told so
PATIENCE = 10.0  # seconds a server that was there may be away, e.g. restarted
PAUSE = 0.25  # seconds between two looks


def ask_server(address: str, what: str, seconds: float = ANSWER, **arguments: Any) -> Any:
    """ServerError FL-S207 where no server answers."""
    from atoll.client.inspect import ask

    try:
        return ask(address, what, seconds, **arguments)
    except ClientError as error:
        if error.code != "FL-C101":
            raise
        raise ServerError("FL-S207", error.message, error.hint) from error


@dataclass(frozen=True)
class Place:
    """Where a run is looked for: at an address, or in a state directory, served or not."""

    address: str | None = None
    state: Path | None = None

    def __post_init__(self) -> None:
        if self.address is not None:
            split_address(self.address, least=0)

    def status(self, seconds: float | None = None) -> Status:
        """`seconds` a server may take to answer; None: ANSWER, with a word to whoever waits.
        ServerError FL-S207: nobody answers; FL-S107: no run in that state directory."""
        if seconds is None:
            with _word():
                return self.status(ANSWER)
        if self.state is None:
            assert self.address is not None
            return Status.of(ask_server(self.address, "status", seconds), address=self.address)
        state = offline.find(self.state)
        address = served_at(state)
        if address is not None:
            try:
                told = ask_server(address, "status", seconds)
            except ServerError as error:
                if "unavailable" not in error.message and not held(state):
                    raise  # somebody listens, who does not answer
            else:
                spec = RunSpec.read(state / "run.json")
                if told["run"] == spec.id:  # else the port has passed to another run's server
                    return Status.of(told, address=address, state_dir=str(state))
        return silent(state) if held(state) else offline.status(state)


@contextlib.contextmanager
def _word() -> Iterator[None]:
    told = f"the server does not answer yet, waiting up to {ANSWER:g} s"
    word = threading.Timer(WORD, console.say, (told,))
    word.daemon = True
    word.start()
    try:
        yield
    finally:
        word.cancel()


def silent(state: Path) -> Status:
    """Of a run whose server is there and does not answer: it is starting, busy or frozen."""
    told, pid = offline.status(state), read_note(state).get("pid")
    if told.state == "finished":
        return told
    why = f"its server{'' if pid is None else f' (pid {pid})'} does not answer"
    clients = (replace(c, reason=why) if c.state == "offline" else c for c in told.clients)
    return replace(told, state="running", reason=why, clients=tuple(clients))


def served_at(state: Path) -> str | None:
    """The address in the note of the server that runs, or died, on a state directory."""
    address = read_note(state).get("address")
    return address if isinstance(address, str) else None


# ---- what happens --------------------------------------------------------------------------


class Source(Protocol):
    @property
    def pause(self) -> float:
        """Seconds to wait after a look at which there was nothing new."""

    def rows(self) -> list[Row]:
        """New rows of the history."""


@dataclass
class FromFile:
    """The history file, as it grows."""

    path: Path
    pause: float = PAUSE
    _read: int = 0  # bytes
    _lines: int = 0

    def rows(self) -> list[Row]:
        """ServerError FL-S206, naming the line, where one is no row."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                text = file.read()
        except OSError:
            text = b""
        whole = text[: text.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]
        found = []
        try:
            for at, line in enumerate(lines, self._lines + 1):
                if line:
                    found.append(parse(line, f"{self.path}:{at}"))
        except ValueError as error:
            raise offline.unread(self.path, error) from error
        self._read += len(whole)
        self._lines += len(lines)
        return found


@dataclass
class FromServer:
    """The server's history, which it hands out as it grows."""

    address: str
    pause: float = 0.0  # it waits in its answer
    _seen: int = 0  # rows
    _now: float = 0.0  # run clock of the last one

    def rows(self) -> list[Row]:
        told = ask_server(self.address, "history", after=self._seen, wait=PAUSE)
        found: list[Row] = [json.loads(line) for line in told["lines"]]
        # A restarted server counts rows that the former one kept out of its answers.
        new = [row for row in found if row["t"] >= self._now]
        self._seen = min(self._seen + len(found), int(told["total"]))
        self._now = new[-1]["t"] if new else self._now
        return new


@dataclass
class Watch:
    """Follows a run to its end. `on_row` hears of every row, `live` shows where it stands."""

    place: Place
    live: Live
    on_row: Callable[[Row], None]
    history: History = field(default_factory=History)

    def run(self) -> Status:
        """The last status. ServerError FL-S207 where the server is gone for good."""
        status = self.place.status()
        with self.live:
            for now, told, rows in self._news(status):
                status = told
                for row in rows:
                    self.history.append(row)
                    self.on_row(row)
                    self.live.row(row)
                self.live.show(picture(self.history, status, now))
        if self.history.finished is None:
            return status
        return offline.end_of(status, self.history)

    def _news(self, status: Status) -> Iterator[tuple[float, Status, list[Row]]]:
        """(run clock, status, rows) until the run is over or its server has stopped."""
        asked = heard = news = time.monotonic()
        source = self._source()
        while True:
            served = status.state == "running"
            try:
                rows = source.rows()
                moment = time.monotonic()
                if served and moment - asked > 2 * PAUSE:
                    status, asked = self.place.status(2.0), moment
                heard = moment
            except ServerError as error:
                if error.code != "FL-S207" or time.monotonic() - heard > PATIENCE:
                    raise
                time.sleep(PAUSE)
                continue
            since = time.monotonic() - asked if served else 0.0
            yield status.elapsed_s + since, status, rows
            if self.history.finished is not None:
                return
            if not (served or rows):
                # A server says that it has finished before the last rows are written.
                if status.state != "finished" or time.monotonic() - news > PATIENCE:
                    return
                time.sleep(PAUSE)
            elif served and not rows:
                time.sleep(source.pause)
            if served or rows:
                news = time.monotonic()

    def _source(self) -> Source:
        if self.place.state is not None:
            return FromFile(offline.find(self.place.state) / "history.jsonl")
        assert self.place.address is not None
        return FromServer(self.place.address)


def picture(history: History, status: Status, now: float) -> LiveView:
    """The live table: the history, with what only the server knows at this moment."""
    states: dict[str, tuple[State, str]] = {
        c.name: ("gone", c.reason) for c in status.clients if c.doing in ("suspect", "offline")
    }
    return view(
        history,
        title=f"{status.name}, {status.strategy.split(':')[0]}",
        target=status.target,
        now=max(now, history.now) if history.finished is None else history.now,
        progress={c.name: c.step or 0 for c in status.clients},
        states={name: told for name, told in states.items() if history.finished is None},
    )
