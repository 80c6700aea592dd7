"""Help of the three command lines: whole sentences, and lines broken where they can be copied."""

from collections.abc import Iterable

import click

_WHOLE = "\u2011"  # a hyphen at which no line is broken


class Formatter(click.HelpFormatter):
    """Breaks no line at a hyphen: a command broken into `fl-` and `server` cannot be copied."""

    def write_text(self, text: str) -> None:
        super().write_text(text.replace("-", _WHOLE))

    def write_dl(
        self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2
    ) -> None:
        whole = [(name, text.replace("-", _WHOLE)) for name, text in rows]
        super().write_dl(whole, col_max, col_spacing)

    def getvalue(self) -> str:
        return super().getvalue().replace(_WHOLE, "-")


class _Context(click.Context):
    formatter_class = Formatter


def dress(command: click.Command) -> None:
    """Its help, and that of the commands in it: with whole sentences, which click cuts short."""
    command.context_class = _Context
    for one in command.commands.values() if isinstance(command, click.Group) else ():
        first = (one.help or "").strip().split("\n\n")[0]
        one.short_help = " ".join(first.split()).split(". ")[0].removesuffix(".") + "."
        dress(one)
