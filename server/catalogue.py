"""Catalogue: every part there is to mix, built in or installed, without importing one of them.

The tables of names stand in the code of their slots, beside torch; they and the parts are read
from the source (`atoll.protocols.reading`), so a listing is quick and runs nobody's code.
"""

import importlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from atoll.protocols import codecspec, facts, reading, slots
from atoll.protocols.errors import UsageError
from atoll.protocols.facts import Facts

TABLES: Mapping[str, str] = {  # slot -> where its built-in names stand
    "strategy": "atoll.server.spec:STRATEGIES",
    "aggregator": "atoll.aggregation.aggregator:BUILTIN",
    "outer": "atoll.aggregation.outer:BUILTIN",
    "local algorithm": "atoll.client.algorithm:BUILTIN",
    "codec": "atoll.protocols.codecspec:BUILTIN",
    "model": "atoll.client.models:BUILTIN",
    "data": "atoll.client.data:BUILTIN",
}
MIXED = ("strategy", "aggregator", "outer", "local algorithm", "codec")


@dataclass(frozen=True)
class Entry:
    """One part that can be named."""

    slot: str
    name: str
    where: str  # module:object
    package: str  # that offers it; empty: built in
    source: reading.Source | None  # None: it has none that can be read
    error: str = ""  # why it cannot be used

    @property
    def summary(self) -> str:
        """In one line: its module's where that is about it by name, else its own."""
        if self.source is None:
            return self.error
        subject, _, idea = self.source.about.partition(": ")
        named = {_letters(self.name), _letters(self.where.rpartition(":")[2])}
        text = idea if _letters(subject) in named else self.source.summary or self.source.about
        return text[:1].upper() + text[1:] if re.match(r"[a-z]+(\.| [a-z])", text) else text

    @property
    def facts(self) -> Facts:
        """Without what depends on its parameters."""
        return of_source(self.slot, self.name, self.source)


@dataclass(frozen=True)
class Part:
    """One part under all its names, as a listing shows it."""

    names: tuple[str, ...]
    entry: Entry

    @property
    def summary(self) -> str:
        return self.entry.summary

    @property
    def parameters(self) -> tuple[reading.Parameter, ...]:
        return self.entry.source.parameters if self.entry.source else ()

    @property
    def papers(self) -> tuple[str, ...]:
        return tuple(self.entry.source.papers) if self.entry.source else ()

    def told(self) -> dict[str, object]:
        """Its object in --json; what only its parameters decide stands in `by_parameters`."""
        entry, found = self.entry, self.entry.facts
        declared = {"needs", "gives", "refuses", "min_results"}
        return {
            "name": self.names[0],
            "also": list(self.names[1:]),
            "summary": self.summary,
            "papers": list(self.papers),
            "needs": sorted(found.needs),
            "gives": sorted(found.gives),
            "refuses": sorted(found.refuses),
            "min_results": found.min_results,
            "by_parameters": sorted(declared & entry.source.computed) if entry.source else [],
            "parameters": [
                {"name": p.name, "default": p.default, "says": p.says, "choices": list(p.choices)}
                for p in self.parameters
            ],
            "object": entry.where,
            "package": entry.package,
            "error": entry.error,
        }


def parts(slot: str) -> list[Part]:
    """Each part once, under the name that comes first."""
    names: dict[str, list[str]] = {}
    first: dict[str, Entry] = {}
    for entry in entries(slot):
        key = entry.where or entry.name
        names.setdefault(key, []).append(entry.name)
        first.setdefault(key, entry)
    return [Part(tuple(names[key]), entry) for key, entry in first.items()]


def builtin(slot: str) -> dict[str, str]:
    """The names of a slot, and where each leads."""
    try:
        return reading.table(TABLES[slot])
    except LookupError:  # no source: installed without, or a table that is computed
        module, _, name = TABLES[slot].partition(":")
        return dict(getattr(importlib.import_module(module), name))


def entries(slot: str) -> list[Entry]:
    """All there are: the built-in ones in their own order, then those of installed packages."""
    found, table = [], builtin(slot)
    offered = slots.installed(slot)
    for name in [*table, *(name for name in offered if name not in table)]:
        points = offered.get(name, [])
        package = slots.offerer(points[0]) if points else ""
        try:
            where, package = slots.locate(slot, name, table)
            found.append(Entry(slot, name, where, package, *_source(where)))
        except UsageError as error:
            found.append(Entry(slot, name, "", package, None, error.message))
    return found


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


def _source(where: str) -> tuple[reading.Source | None, str]:
    """What can be read of it, and why it surely cannot be used."""
    try:
        return reading.read(where), ""
    except LookupError:
        package = where.partition(":")[0].partition(".")[0]
        there = importlib.util.find_spec(package) is not None
        return None, "" if there else f"{where} cannot be imported: no package {package}"


def facts_of(slot: str, spec: str) -> Facts:
    """What can be known of a part that a spec names, before it is imported."""
    kind, name = slot, spec
    if slot in ("codec", "codec down"):
        kind, name = "codec", codecspec.parse(spec).name
    try:
        source = reading.read(slots.locate(kind, name, builtin(kind))[0])
    except (LookupError, UsageError):  # nothing to read, or for others to refuse
        source = None
    found = of_source(slot, spec, source)
    return with_around(found) if kind == "codec" else found


def with_around(codec: Facts) -> Facts:
    """The facts of a codec, and of what stands around it in its spec."""
    if codecspec.parse(codec.name).feedback is None:
        return codec
    return replace(
        codec, needs=codec.needs | {"client_state"}, gives=codec.gives | {"error_feedback"}
    )


def of_source(slot: str, name: str, source: reading.Source | None) -> Facts:
    return facts.told(slot, name, (source.attributes if source else {}).get)


def offers() -> Iterator[Facts]:
    """What could stand in a mix; a codec in both of its slots."""
    for slot in MIXED:
        for entry in entries(slot):
            yield entry.facts
            if slot == "codec":
                yield of_source("codec down", entry.name, entry.source)
