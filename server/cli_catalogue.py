"""`fl-server strategies`, `aggregators`, `outers`, `locals`, `codecs`: what there is to mix."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from atoll.protocols import console
from atoll.protocols.errors import UsageError

if TYPE_CHECKING:
    from atoll.server.catalogue import Part

NARROW = 20  # columns under which wrapping makes nothing readable

COMMANDS = {  # command: (slot, option, what it lists)
    "strategies": ("strategy", "--strategy", "when to train whom, and what to merge"),
    "aggregators": ("aggregator", "--aggregator", "how many updates become one"),
    "outers": ("outer", "--outer", "the step the global model takes with it"),
    "locals": ("local algorithm", "--local", "the client's half of a method"),
    "codecs": ("codec", "--codec", "how tensors travel"),
}


def command(name: str) -> click.Command:
    """One listing; `COMMANDS` has their names."""
    slot, option, what = COMMANDS[name]

    @click.command(name, help=f"List what {option} can be: {what}. With NAME, all about that one.")
    @click.argument("one", metavar="[NAME]", default="")
    @console.json_option
    def listing(one: str, as_json: bool) -> None:
        from atoll.server.catalogue import parts

        found = parts(slot)
        if one:
            found = [part for part in found if one in part.names]
            if not found:
                raise UsageError("FL-S101", f"unknown {slot} {one!r}", f"see `fl-server {name}`")
        told = {"slot": slot, "option": option, "parts": [part.told() for part in found]}
        width = console.width()
        if one:
            shown = all_about(found[0], width)
        else:
            shown = records(found) if width is None else screen(found, width)
        console.emit(told, as_json, shown)
        if not (as_json or one):
            console.say(f"{option} NAME:parameter=value,...; or module:object of yours")

    return listing


def screen(parts: "Sequence[Part]", width: int) -> str:
    """A block for each, wrapped to a terminal of so many columns."""
    lines = []
    for part in parts:
        lines.append(", ".join(part.names))
        for text in (console.clean(part.summary), *_facts(part)):
            lines += wrapped(text, width, "    ")
    return "\n".join(lines)


def records(parts: "Sequence[Part]") -> str:
    """A line for each, whole: names, summary, parameters, facts and papers, with tabs between."""
    lines = []
    for part in parts:
        papers = list(part.papers)
        facts = [fact for fact in _facts(part) if fact not in papers]
        given = facts.pop(0) if part.parameters else ""
        fields = (", ".join(part.names), part.summary, given, "; ".join(facts), " ".join(papers))
        lines.append("\t".join(map(console.clean, fields)))
    return "\n".join(lines)


def all_about(part: "Part", width: int | None) -> str:
    """Everything of one; `width` None: no line is wrapped."""
    rows = [(p.name, p.default or "", _says(p.choices, p.says)) for p in part.parameters]
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    facts = _facts(part)[1 if part.parameters else 0 :]
    lines = [f"{', '.join(part.names)}  {console.clean(part.summary)}"]
    if width is not None:
        lines = wrapped(lines[0], width, "", "  ")
    lines += [line for fact in facts for line in wrapped(fact, width, "  ")]
    lines += [""] if rows else []
    for name, default, says in rows:
        head = f"  {name:<{widths[0]}}  {default:<{widths[1]}}  "
        lines += wrapped(says, width, head, " " * len(head))
    return "\n".join(lines)


def wrapped(text: str, width: int | None, first: str, then: str | None = None) -> list[str]:
    """`text` behind `first`, its further lines behind `then` (the same, if it is not given)."""
    behind = first if then is None else then
    if width is None or width - len(behind) < NARROW:
        return [f"{first}{text}".rstrip()]
    lines = textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=behind,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return lines or [first.rstrip()]


def _facts(part: "Part") -> list[str]:
    told: dict[str, Any] = part.told()
    lines = []
    if part.parameters:
        lines.append(", ".join(f"{p.name}={p.default}" for p in part.parameters))
    lines += [f"needs {_words(told['needs'])}"] if told["needs"] else []
    lines += [f"refuses {_words(told['refuses'])}"] if told["refuses"] else []
    if told["min_results"] is not None:
        lines.append(f"needs {told['min_results']} updates for a version")
    if "min_results" in told["by_parameters"]:
        lines.append("needs so many updates for a version as its parameters say")
    if "needs" in told["by_parameters"]:
        lines.append("needs of the run what its parameters say")
    lines += [f"from {told['package']}"] if told["package"] else []
    return lines + list(told["papers"])


def _words(tokens: Sequence[str]) -> str:
    from atoll.aggregation.compose import meaning

    return "; ".join(map(meaning, tokens))


def _says(choices: Sequence[str], says: str) -> str:
    return "; ".join(part for part in (" or ".join(choices), says) if part)
