"""Line: how a peer's run goes, as one line that is redrawn; elsewhere a line for each round."""

import shutil
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import click

from atoll.protocols import console


class Line:
    """`show` it a status at each beat. `leaving`: somebody asked the peer to stop."""

    def __init__(
        self,
        quiet: bool = False,
        up: Callable[[Mapping[str, Any]], None] = lambda status: None,
    ) -> None:
        """`up` is called with the first status, before it is shown."""
        self._up: Callable[[Mapping[str, Any]], None] | None = up
        self._quiet, self._live = quiet, console.interactive()
        self._last = self._shown = ""
        self.leaving = False
        self.alone = True  # no other member is near

    def __enter__(self) -> "Line":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shown and self._live:
            click.echo(err=True)

    def leave(self) -> None:
        self.leaving = True

    def show(self, status: Mapping[str, Any]) -> None:
        if self._up is not None:
            self._up(status)
            self._up = None
        near = near_members(status)
        self.alone = len(near) < 2
        if self._quiet:
            return
        text = text_of(status)
        if self._live:
            self._shown = text
            room = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be redrawn
            click.echo(f"\r\x1b[2K{text[:room]}", err=True, nl=False)
            return
        mark = f"{status.get('round')} {sorted(near)} {waits(status)}"
        if mark != self._last:
            self._last, self._shown = mark, text
            console.say(text)


def near_members(status: Mapping[str, Any]) -> list[str]:
    """Ids of those that were heard within ten seconds, this peer first."""
    found = []
    for member in status.get("members", ()):
        silent = member.get("silent", None)
        if member.get("peer") == status.get("peer") or (silent is not None and silent < 10):
            found.append(str(member.get("peer")))
    return found


def text_of(status: Mapping[str, Any]) -> str:
    rounds, loss = status.get("rounds"), status.get("loss")
    near = len(near_members(status))
    parts = [
        f"round {status.get('round', 0)}{f'/{rounds}' if rounds else ''}",
        f"{near} peer{'' if near == 1 else 's'}",
        "loss -" if loss is None else f"loss {loss:.4f}",
        f"up {console.size(status.get('bytes_out', 0))}",
        f"down {console.size(status.get('bytes_in', 0))}",
        str(status.get("state", "")),
    ]
    return console.clean("   ".join(part for part in [*parts, waits(status)] if part))


def waits(status: Mapping[str, Any]) -> str:
    """For whom, where too few of those who made the last round answer to make another."""
    missing = [str(peer) for peer in status.get("missing") or ()]
    if not missing:
        return ""
    names = {member.get("peer"): member.get("name", "") for member in status.get("members", ())}
    who = ", ".join(f"{names.get(peer, '')} …{peer[-8:]}".strip() for peer in missing[:3])
    more = f" or {len(missing) - 3} others" if len(missing) > 3 else ""
    return f"waits for {who}{more}: too few of the last round's members answer"
