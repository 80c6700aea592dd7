"""Daemon: hivemind's libp2p process, `p2pd`, as a child that dies with us.

We start it ourselves: hivemind's own way leaves it running when its program is killed, and does
not notice when it is gone or frozen.
"""

import asyncio
import contextlib
import importlib.resources
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from atoll.protocols.errors import PeerError

START_SECONDS = 15.0
LOOKING = 40.0  # seconds for whoever joins until a member has answered
STOP_SECONDS = 2.0
NOTE = "sockets"  # the file that says where they lie, if not beside it
SHORT = "atoll-"  # how such a directory's name begins
LONGEST_SOCKET = 100  # bytes: a Unix socket's path ends at 107, hivemind adds a name to it
# Has the kernel kill it when its parent's thread ends, and becomes p2pd; where the kernel cannot,
# it dies when its socket's other end is silent for long. A program of its own, not a function
# between fork and exec: that one runs amid whatever locks gRPC's threads held.
BECOME = """\
import ctypes, os, signal, sys
parent, binary = int(sys.argv[1]), sys.argv[2]
if sys.platform.startswith("linux"):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it was killed before the line above
        sys.exit(1)
os.execv(binary, sys.argv[2:])
"""
# Else libp2p has two daemons listen on one port, and who connects meets the one or the other.
ALONE = {"LIBP2P_TCP_REUSEPORT": "false"}


class Daemon:
    """One `p2pd`. `gone` is set when it has ended, for whatever reason."""

    def __init__(self, folder: Path, listen: Sequence[str], bootstrap: Sequence[str] = ()) -> None:
        """`folder` holds its identity and is private to it. `listen`, `bootstrap`: multiaddrs;
        without `listen` nobody can connect to it, and it does not serve the directory."""
        self.folder = folder.absolute()  # its sockets are addressed from anywhere
        self.listen = tuple(listen)
        self.bootstrap = tuple(bootstrap)
        self.gone = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._short: Path | None = None
        self._said: list[str] = []

    @property
    def sockets(self) -> Path:
        """Where Unix sockets lie: `folder`, or a private one where its path is too long."""
        if len(os.fsencode(self.folder)) + 48 <= LONGEST_SOCKET:
            return self.folder
        if self._short is None:
            self._short = _short(self.folder)
        return self._short

    @property
    def control(self) -> str:
        """Multiaddr of the socket that commands it."""
        return f"/unix{self.sockets / 'p2pd.sock'}"

    @property
    def identity(self) -> Path:
        return self.folder / "identity.key"

    @property
    def pid(self) -> int:
        assert self._process is not None, "start it first"
        return self._process.pid

    async def start(self) -> None:
        """Start it and wait until it answers. PeerError FL-P201 where it does not."""
        binary = importlib.resources.files("hivemind.hivemind_cli") / "p2pd"
        if not os.access(str(binary), os.X_OK):
            raise _did_not_start(f"no program {binary}", "install hivemind anew, from its wheel")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.sockets / "p2pd.sock")
        arguments = [
            f"-listen={self.control}", f"-id={self.identity}", "-connManager=1", "-tls=1",
            "-natPortMap=0", "-autonat=0", "-relay=0",
        ]  # fmt: skip
        if self.listen:
            arguments += [f"-hostAddrs={','.join(self.listen)}", "-dhtServer=1"]
        else:
            arguments += ["-noListenAddrs=1", "-dhtClient=1"]
        if self.bootstrap:
            arguments += ["-b=1", f"-bootstrapPeers={','.join(self.bootstrap)}"]
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-ISc", BECOME, str(os.getpid()), str(binary), *arguments,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT, env={**os.environ, **ALONE},
            )  # fmt: skip
        except OSError as error:
            raise _did_not_start(f"{binary}: {error.strerror}") from error
        late = False
        try:
            async with asyncio.timeout(START_SECONDS):
                ready = await self._ready()
        except TimeoutError:
            ready, late = False, True
        if not ready:
            await self.stop()
            said = "; ".join(self._said[-3:]) or f"nothing came for {START_SECONDS:g} s"
            # With no place to start from it is up in a second: so long takes only the way there.
            away = "bootstrap" in said or (late and self.bootstrap)
            raise unreachable(self.bootstrap, said) if away else _did_not_start(said)
        self._reading = asyncio.create_task(self._drain())

    async def stop(self) -> None:
        """End it, gently where it listens; no-op where it is gone."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)  # a stopped one would not hear the next
                process.terminate()
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await process.wait()
            except TimeoutError:
                self.kill()
                await process.wait()
        if self._reading is not None:
            await self._reading
        self.gone.set()
        if self._short is not None:
            shutil.rmtree(self._short, ignore_errors=True)
            (self.folder / NOTE).unlink(missing_ok=True)
            self._short = None

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _ready(self) -> bool:
        async for line in self._lines():
            if line.startswith("Peer ID:"):
                return True
        return False

    async def _drain(self) -> None:
        """Read on: a full pipe would block it, and the pipe's end says that it is gone."""
        async for _ in self._lines():
            pass
        self.gone.set()

    async def _lines(self) -> AsyncIterator[str]:
        assert self._process is not None
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            text = line.decode(errors="replace").strip()
            self._said = [*self._said[-9:], text]
            yield text


def _short(folder: Path) -> Path:
    """A private directory for the sockets of one whose path is too long. That of a process that was
    killed goes: nobody else would remove it. Not where it is in use: `folder` may be a copy."""
    note = folder / NOTE
    with contextlib.suppress(OSError, ValueError):
        former = Path(note.read_text())
        ours = former.parent == Path(tempfile.gettempdir()) and former.name.startswith(SHORT)
        if ours and not _answers(former / "p2pd.sock"):
            shutil.rmtree(former)
    made = Path(tempfile.mkdtemp(prefix=SHORT))  # with mode 0700
    with contextlib.suppress(OSError):  # then it is left behind by who is killed
        note.write_text(str(made))
    return made


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as trial:
        try:
            trial.connect(str(path))
        except OSError:
            return False
    return True


def unreachable(bootstrap: Sequence[str], why: str) -> PeerError:
    return PeerError(
        "FL-P202",
        f"none of {', '.join(bootstrap)} answers: {why}",
        "does a peer of the swarm run there, and may this machine reach its port? "
        "are both clocks right within 3 seconds?",
    )


def _did_not_start(why: str, remedy: str = "") -> PeerError:
    return PeerError(
        "FL-P201",
        f"the peer daemon p2pd does not start: {why}",
        remedy or "is the port taken, or the address not this machine's? see `fl-peer doctor`",
    )
