"""`fl-server strategies`, `aggregators`, `outers`, `locals`, `codecs`: what there is to mix."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from atoll.protocols import console
from atoll.protocols.errors import UsageError

if TYPE_CHECKING:
    from atoll.server.catalogue import Part

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
        console.emit(told, as_json, _all_about(found[0]) if one else _screen(found, option))

    return listing


def _screen(parts: "Sequence[Part]", option: str) -> str:
    width = max(len(", ".join(part.names)) for part in parts)
    lines = []
    for part in parts:
        lines.append(f"{', '.join(part.names):<{width}}  {console.clean(part.summary)}")
        lines += [f"{'':<{width}}    {line}" for line in _facts(part)]
    return "\n".join([*lines, "", f"{option} NAME:parameter=value,...; or module:object of yours"])


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
    lines += [f"from {told['package']}"] if told["package"] else []
    return lines + list(told["papers"])


def _all_about(part: "Part") -> str:
    rows = [(p.name, p.default or "", _says(p.choices, p.says)) for p in part.parameters]
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    table = [f"  {n:<{widths[0]}}  {d:<{widths[1]}}  {s}".rstrip() for n, d, s in rows]
    facts = _facts(part)[1 if part.parameters else 0 :]
    head = f"{', '.join(part.names)}  {console.clean(part.summary)}"
    return "\n".join([head, *(f"  {line}" for line in facts), *([""] if table else []), *table])


def _words(tokens: Sequence[str]) -> str:
    from atoll.aggregation.compose import meaning

    return "; ".join(map(meaning, tokens))


def _says(choices: Sequence[str], says: str) -> str:
    return "; ".join(part for part in (" or ".join(choices), says) if part)
