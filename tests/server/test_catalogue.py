"""Catalogue: what is read without an import is what the imported code says."""

import dataclasses
import importlib
import inspect
import subprocess
import sys

import pytest

from atoll.protocols import facts, reading, slots
from atoll.protocols.facts import TOKENS
from atoll.server import catalogue

ALL = [entry for slot in catalogue.TABLES for entry in catalogue.entries(slot)]
MIXED = [entry for entry in ALL if entry.slot in catalogue.MIXED]


def ids(entry: catalogue.Entry) -> str:
    return f"{entry.slot} {entry.name}"


def loaded(entry: catalogue.Entry) -> object:
    return slots.find(entry.slot, entry.name, catalogue.builtin(entry.slot))


@pytest.mark.parametrize("slot", catalogue.TABLES)
def test_the_names_read_are_those_of_the_table(slot: str) -> None:
    module, _, name = catalogue.TABLES[slot].partition(":")
    assert catalogue.builtin(slot) == dict(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("entry", ALL, ids=ids)
def test_every_part_can_be_read_and_says_what_it_is(entry: catalogue.Entry) -> None:
    assert entry.source is not None, entry.error
    assert len(entry.summary) > 8
    assert "\n" not in entry.summary


@pytest.mark.parametrize("entry", MIXED, ids=ids)
def test_facts_that_were_read_are_those_of_the_class(entry: catalogue.Entry) -> None:
    found = loaded(entry)
    if isinstance(found, type):
        assert entry.facts == facts.of_object(entry.slot, entry.name, found)


@pytest.mark.parametrize("entry", MIXED, ids=ids)
def test_parameters_that_were_read_are_those_of_the_signature(entry: catalogue.Entry) -> None:
    assert entry.source is not None
    found = loaded(entry)
    assert callable(found)
    wanted = {
        p.name: p.default
        for p in inspect.signature(found).parameters.values()
        if p.kind is not p.VAR_KEYWORD
    }
    assert [p.name for p in entry.source.parameters] == list(wanted)
    for parameter in entry.source.parameters:
        default = wanted[parameter.name]
        if default is inspect.Parameter.empty:
            assert parameter.default is None
        elif not (isinstance(found, type) and dataclasses.is_dataclass(default)):
            assert parameter.default == str(default)


@pytest.mark.parametrize("entry", MIXED, ids=ids)
def test_every_word_that_is_declared_is_explained(entry: catalogue.Entry) -> None:
    said = entry.facts
    assert said.needs | said.gives | said.refuses <= set(TOKENS)


def test_a_codec_on_the_way_down_gives_other_words() -> None:
    (lossy,) = (f for f in catalogue.offers() if (f.slot, f.name) == ("codec down", "bf16"))
    assert lossy.gives == {"down_lossy"}
    assert catalogue.facts_of("codec down", "bf16").gives == {"down_lossy"}
    assert catalogue.facts_of("codec", "bf16").gives == {"lossy"}


def test_stages_of_a_codec_are_one_part() -> None:
    found = catalogue.facts_of("codec", "topk:0.01+ef")
    assert found.name == "topk:0.01+ef"
    assert found.gives == {"lossy", "sparse", "error_feedback"}
    assert found.needs == {"client_state"}


def test_a_part_that_cannot_be_read_has_no_facts() -> None:
    assert catalogue.facts_of("aggregator", "no_such_module:X") == facts.Facts(
        "aggregator", "no_such_module:X"
    )


def test_the_catalogue_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom atoll.server import catalogue\n"
        "assert len(list(catalogue.offers())) > 20\n"
        "print(sorted({'torch', 'numpy', 'grpc'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert told.stdout == "[]\n", told.stderr


def test_a_table_without_source_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def unread(where: str) -> dict[str, str]:
        raise LookupError(where)

    known = catalogue.builtin("outer")
    monkeypatch.setattr(reading, "table", unread)
    assert catalogue.builtin("outer") == known
