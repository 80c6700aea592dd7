"""Children: the processes of a demo. They die with us, and one that dies by itself is seen.

Every child holds the reading end of a pipe whose writing end only we have: when we are gone,
however we went, it reads the end and stops. No process group, no signal handler can be forgotten.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

MAX_RESTARTS = 5  # of one child: what dies that often will not live


@dataclass
class Child:
    """One process and what it says, in a file: stdout is the last life's, stderr all lives'."""

    name: str
    module: str  # "atoll.client"
    arguments: Sequence[str]
    folder: Path  # of its output
    restarts: int = 0
    reason: str = ""  # why it died last
    _process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.out.open("wb") as out, self.err.open("ab") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module, *self.arguments],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                start_new_session=True,  # Ctrl-C is for us: we tell the children in order
                env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            )

    @property
    def out(self) -> Path:
        return self.folder / f"{self.name}.out"

    @property
    def err(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    @property
    def code(self) -> int | None:
        """Its exit code; None: it has none yet."""
        return self._process.poll() if self._process else None

    def died(self) -> bool:
        """Whether it has ended in any way but well; `reason` says how."""
        code = self.code
        if code is None or code == 0:
            return False
        self.reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return True

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ended_well(self) -> bool:
        return self._process is not None and self._process.poll() == 0

    def restart(self) -> None:
        self.restarts += 1
        self.close()
        self.start()

    def ask_to_end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """With SIGKILL: to the others it is as if its machine had lost power."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self.close()

    def stop(self, seconds: float) -> None:
        """Ask it to end, then make it."""
        if self._process is None:
            return
        self.ask_to_end()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.close()

    def wait(self, seconds: float) -> bool:
        """Whether it ended by itself in this time."""
        assert self._process is not None
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def last_words(self, lines: int = 3) -> str:
        """The end of its log, for an error message."""
        try:
            text = self.err.read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.strip().splitlines()[-lines:])
