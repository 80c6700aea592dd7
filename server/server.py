"""Server: one run, from an empty or an existing state directory to its last version.

    state/  lock  server.json (pid, address)  run.json  journal.sqlite  history.jsonl
            versions/<N>/model.safetensors  updates/  rows/

The port accepts before torch is imported; callers wait for the run, not for a connection.
"""

import asyncio
import contextlib
import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from atoll.protocols import loops, messages
from atoll.protocols.address import check_served
from atoll.protocols.channel import SERVER_OPTIONS, tune_malloc
from atoll.protocols.codecspec import parse_ways
from atoll.protocols.errors import RemoteError, UsageError
from atoll.protocols.ids import ulid
from atoll.protocols.prompt import prompt
from atoll.server.bulk import Bulk
from atoll.server.check import check
from atoll.server.claim import folder_made
from atoll.server.door import bind, locked, write_note
from atoll.server.presets import preset_of
from atoll.server.rules import Rules
from atoll.server.service import Service
from atoll.server.spec import RunSpec, begun, open_spec
from atoll.server.uploads import Uploads

if TYPE_CHECKING:
    from atoll.server.assembly import Assembly
    from atoll.server.host import Host

Row = dict[str, object]

PAUSE = 30.0  # seconds that a client which lost us may wait until it looks again, or half a lease
LINGER = 5.0  # seconds more, after the end of a run, for clients that have not heard of it
MOST_WAIT = 10.0  # seconds that a question waits for news


@dataclass(frozen=True)
class Summary:
    """How a run ended, or stopped for now."""

    run: str
    reason: str  # empty: stopped for now, start again to go on
    versions: int
    updates: int
    steps: int
    seconds: float  # run clock
    metrics: Mapping[str, float] = field(default_factory=dict)  # of the model exported
    best_version: int | None = None
    reached_at: float | None = None


class Server:
    """Serve one run: `Server(net, strategy=FedAvg(rounds=20, steps=50)).run("127.0.0.1:7447")`.

    Every slot takes a name as on the command line, or an object. `model` is an nn.Module or what
    makes one; `data` (a name, or what `load_data` gives) evaluates the versions, None leaves that
    to the clients. `proxy` (a name, or examples apart from the test set) is what an aggregator such
    as FedLAW learns by. `outer` None is what the strategy asks for, else plain averaging. A
    `folder` that holds a run is continued: give it the same objects again.
    """

    def __init__(
        self,
        model: object = "mlp",
        *,
        strategy: object = "fedcompass",
        aggregator: object = "mean",
        outer: object = None,
        data: object = None,
        proxy: object = None,
        codec: str = "fp32",
        dp: str = "",
        local_dp: str = "",
        rules: Rules | None = None,
        folder: Path | str = "atoll-state",
        init: Path | None = None,
        insecure_lan: bool = False,
        seed: int = 0,
        lease: float = 20.0,
        local: Mapping[str, bool | int | float | str] | None = None,
    ) -> None:
        preset = preset_of(strategy)
        given = {
            "model": model,
            "strategy": strategy,
            "aggregator": aggregator,
            "outer": preset.outer if outer is None else outer,
            "data": data,
            "proxy": proxy,
        }
        names = {k: v if isinstance(v, str) else own_name(v) for k, v in given.items()}
        up, down = parse_ways(codec).texts
        wanted = RunSpec(
            ulid(), strategy=names["strategy"], aggregator=names["aggregator"],
            outer=names["outer"], model=names["model"], data=names["data"], proxy=names["proxy"],
            codec_up=up, codec_down=down, local={**preset.local, **(local or {})},
            dp=dp, local_dp=local_dp, seed=seed, lease=lease,
        )  # fmt: skip
        slots = {k: v for k, v in given.items() if v is not None and not isinstance(v, str)}
        if not (Path(folder) / "run.json").exists():
            check(wanted, made=slots)
        wanted = begun(wanted, rules or Rules(), init)
        said = {*names, *({"init"} if init is not None else ())}
        spec = open_spec(Path(folder), wanted, said)
        self._set(spec, Path(folder), rules, slots, init, insecure_lan, None)

    @classmethod
    def of(
        cls,
        spec: RunSpec,
        folder: Path,
        rules: Rules | None = None,
        *,
        slots: Mapping[str, object] | None = None,
        init: Path | None = None,
        insecure_lan: bool = False,
        on_row: Callable[[Row], None] | None = None,
    ) -> "Server":
        """A server of a written spec. `slots` are objects in place of its names; `on_row` hears
        every row of the history."""
        made = cls.__new__(cls)
        made._set(spec, folder, rules, slots or {}, init, insecure_lan, on_row)
        return made

    def _set(
        self,
        spec: RunSpec,
        folder: Path,
        rules: Rules | None,
        slots: Mapping[str, object],
        init: Path | None,
        insecure_lan: bool,
        on_row: Callable[[Row], None] | None,
    ) -> None:
        self.spec = spec
        self.folder = folder
        self.rules = rules or Rules()
        self.address = ""  # host:port once serving
        self._slots = dict(slots)
        self._init = init
        self._insecure_lan = insecure_lan
        self._on_row = on_row
        self._assembly: Assembly | None = None
        self._interrupted: Callable[[bool], None] | None = None
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(
        self,
        address: str = "127.0.0.1:7447",
        ready: Callable[[str], None] | None = None,
        interrupted: Callable[[bool], None] | None = None,
    ) -> Summary:
        """Serve until the run is over, or until SIGINT or SIGTERM. Raises AtollError.

        `interrupted` is called at each SIGINT; with True where it was told to stop before.
        """
        self._interrupted = interrupted
        return loops.run(self.serve(address, ready))

    @property
    def limits(self) -> Rules:
        """Those that hold: of a run that is continued its own, where none are given anew."""
        return self._assembly.driver.rules if self._assembly is not None else self.rules

    @property
    def over(self) -> str:
        """Why the run ended; empty: it has not, or is not served."""
        return self._assembly.host.run.finished or "" if self._assembly is not None else ""

    def stop(self) -> None:
        """Stop for now, from any thread: what is held is saved, and a new start goes on."""
        with contextlib.suppress(RuntimeError):  # it has ended already
            if self._loop is not None and self._stop is not None:
                self._loop.call_soon_threadsafe(self._stop.set)

    async def serve(
        self, address: str = "127.0.0.1:7447", ready: Callable[[str], None] | None = None
    ) -> Summary:
        """As `run`, in a running loop. `ready` is called with the address when clients may come."""
        check_served(address, self._insecure_lan)
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._signals(True)  # also while torch is imported, in a thread that nothing interrupts
        try:
            return await self._open(address, ready)
        finally:
            self._signals(False)

    async def _open(self, address: str, ready: Callable[[str], None] | None) -> Summary:
        loop = asyncio.get_running_loop()
        with locked(self.folder):
            tune_malloc()
            host: asyncio.Future[Host] = loop.create_future()
            server = grpc.aio.server(options=SERVER_OPTIONS)
            uploads = Uploads(folder_made(self.folder / "updates"))
            server.add_generic_rpc_handlers(
                (self._bulk(uploads, host), Service(host, self._inspect))
            )
            self.address = bind(server, address)
            await server.start()
            try:
                write_note(self.folder, self.address)
                return await self._serve(uploads, host, ready)
            finally:
                if not host.done():
                    host.cancel()
                await server.stop(0.5)

    async def _serve(
        self,
        uploads: Uploads,
        host: "asyncio.Future[Host]",
        ready: Callable[[str], None] | None,
    ) -> Summary:
        assembly = self._assembly = await asyncio.to_thread(self._assemble, uploads)
        await assembly.begin()
        host.set_result(assembly.host)
        with prompt():
            return await self._drive(assembly, ready)

    async def _drive(self, assembly: "Assembly", ready: Callable[[str], None] | None) -> Summary:
        assert self._stop is not None
        if ready is not None:
            ready(self.address)
        driving = asyncio.create_task(assembly.driver.serve())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((driving, stopping), return_when=asyncio.FIRST_COMPLETED)
            over = driving.done() and assembly.driver.error is None
            assembly.driver.halt()
            await asyncio.gather(driving, return_exceptions=True)
            await assembly.end(over)
            if over:
                await self._linger(assembly.host, stopping)
            await asyncio.to_thread(assembly.close)
            if assembly.driver.error is not None:
                raise assembly.driver.error
            return assembly.summary()
        finally:
            stopping.cancel()

    async def _linger(self, host: "Host", stopping: "asyncio.Task[bool]") -> None:
        lingering = asyncio.create_task(host.reception.linger())
        most, first = min(PAUSE, self.spec.lease / 2) + LINGER, asyncio.FIRST_COMPLETED
        await asyncio.wait((lingering, stopping), timeout=most, return_when=first)
        lingering.cancel()

    def _assemble(self, uploads: Uploads) -> "Assembly":
        from atoll.server.assembly import Assembly  # imports torch: only now that the port accepts

        return Assembly(
            self.spec, self.folder, self.rules, uploads, self._slots, self._init, self._on_row
        )

    def _signals(self, on: bool) -> None:
        assert self._loop is not None
        assert self._stop is not None
        for number, heard in ((signal.SIGINT, self._interrupt), (signal.SIGTERM, self._stop.set)):
            try:
                if on:
                    self._loop.add_signal_handler(number, heard)
                else:
                    self._loop.remove_signal_handler(number)
            except (ValueError, RuntimeError, NotImplementedError):
                return  # not in the main thread: whoever runs us there stops us by `stop`

    def _interrupt(self) -> None:
        assert self._stop is not None
        if self._interrupted is not None:
            self._interrupted(self._stop.is_set())
        self._stop.set()

    def _bulk(self, uploads: Uploads, host: "asyncio.Future[Host]") -> Bulk:
        def now() -> "Host":
            if not host.done() or host.cancelled():
                raise RemoteError("FL-W109", "the server is starting", "wait", retry_seconds=1.0)
            return host.result()

        async def accepted(client: str, result: messages.Result, stored: Any) -> None:
            await now().accepted(client, result, stored)

        return Bulk(
            uploads,
            authorize=lambda metadata: now().reception.authorize(metadata),
            find_blob=lambda client, blob: now().find_blob(client, blob),
            may_upload=lambda client, result: now().may_upload(client, result),
            accepted=accepted,
            run=self.spec.id,
        )

    def _inspect(self, what: str, arguments: Mapping[str, float]) -> object:
        assert self._assembly is not None
        if what == "run":
            told = {"manifest": self._assembly.manifest.to_json(), "validate": self._assembly.share}
            return {**json.loads(self.spec.for_clients()), **told}
        if what == "status":
            return self._assembly.status()
        if what == "history":
            after, wait = int(arguments.get("after", 0)), float(arguments.get("wait", 0.0))
            return self._assembly.lines(max(0, after), max(0.0, min(wait, MOST_WAIT)))
        raise UsageError("FL-S108", f"cannot inspect {what[:40]!r}", "ask run, status or history")


def own_name(value: object) -> str:
    """What `run.json` says of an object of the user's: its type, empty for None."""
    kind = value if isinstance(value, type) else type(value)
    return "" if value is None else f"{kind.__module__}:{kind.__qualname__}"
