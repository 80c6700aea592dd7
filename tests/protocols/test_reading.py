"""Reading: a class as its source has it, whatever of it can be read."""

import ast
import gc
from pathlib import Path

import pytest

from atoll.protocols import reading
from atoll.protocols.reading import Parameter, locate, read, sentence, table

CODE = '''"""Rule: what it is about. See https://example.org/module."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal
from rule_base_atoll import Base, Gone
import nowhere_atoll

TABLE = {"a": "b"}
NOT_A_TABLE = 3


@dataclass
class Rule(Base, Gone, nowhere_atoll.Other):
    """A first sentence that goes on, e.g. here. Then another, https://example.org/own."""

    needs: ClassVar = frozenset({"x"})
    gives = frozenset()
    refuses: ClassVar[frozenset[str]] = frozenset(TABLE)
    size: int = 3  # how many
    way: Literal["up", "down"] = "up"
    must: str
    state: int = field(default=0, init=False)
    more: list[int] = field(default_factory=list)

    @property
    def min_results(self) -> int:
        return 2

    def combine(self): ...


class Plain(Rule):
    paper = "https://example.org/said"
    min_results = 4

    def __init__(self, a, b: int = 2, *, c: str = "x", **rest): ...  # of no argument


def made(
    alpha: float = 0.5,  # a share
    beta: int = 1,
) -> Rule:
    return Rule()
'''
BASE = """from dataclasses import dataclass


@dataclass
class Base:
    private = False
    gives = frozenset({"y"})
    size: int = 1  # of the base
    first: bool = True
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rule_atoll.py").write_text(CODE)
    (tmp_path / "rule_base_atoll.py").write_text(BASE)
    package = tmp_path / "package_atoll"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('it was run')\n")
    (package / "inner" / "__init__.py").write_text("class Deep:\n    pass\n")
    (package / "broken.py").write_text("class (\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_class_is_its_own_and_its_bases() -> None:
    found = read("rule_atoll:Rule")
    assert found.summary == "A first sentence that goes on, e.g. here."
    assert found.about == "Rule: what it is about. See https://example.org/module."
    assert found.papers == ("https://example.org/own",)
    assert found.attributes == {
        "private": False, "needs": frozenset({"x"}), "gives": frozenset(), "refuses": None,
    }  # fmt: skip
    assert found.computed == {"min_results"}
    assert found.parameters == (
        Parameter("size", "3", "how many", "int"),
        Parameter("first", "True", "", "bool"),
        Parameter("way", "up", "", "Literal['up', 'down']"),
        Parameter("must", None, "", "str"),
        Parameter("more", "field(default_factory=list)", "", "list[int]"),
    )
    assert found.parameters[2].choices == ("up", "down")


def test_an_init_a_paper_and_a_value_go_before_what_is_inherited() -> None:
    found = read("rule_atoll:Plain")
    assert found.papers == ("https://example.org/said",)
    assert found.attributes["min_results"] == 4
    assert found.computed == frozenset()
    assert [(p.name, p.default, p.kind, p.says) for p in found.parameters] == [
        ("a", None, "", ""), ("b", "2", "int", ""), ("c", "x", "str", ""),
    ]  # fmt: skip


def test_a_function_has_its_parameters_and_its_modules_paper() -> None:
    found = read("rule_atoll:made")
    assert found.parameters == (
        Parameter("alpha", "0.5", "a share", "float"),
        Parameter("beta", "1", "", "int"),
    )
    assert found.papers == ("https://example.org/module",)


def test_what_a_module_has_from_another_is_read_there() -> None:
    assert read("rule_atoll:Base").where == "rule_base_atoll:Base"


def test_what_a_lazy_package_exports_is_found_where_it_is() -> None:
    assert read("atoll.aggregation:FedAvg").where == "atoll.aggregation.fedavg:FedAvg"


def test_a_package_on_the_way_is_not_run() -> None:
    assert read("package_atoll.inner:Deep").where == "package_atoll.inner:Deep"
    assert locate("package_atoll.no_such") is None


@pytest.mark.parametrize(
    "where",
    ["rule_atoll:NoSuch", "no_such_atoll:X", "math:sqrt", "package_atoll.broken:X", "..:X"],
)
def test_what_cannot_be_read_is_no_source(where: str) -> None:
    with pytest.raises(LookupError):
        read(where)


def test_a_table_is_a_dict_that_stands_there() -> None:
    assert table("rule_atoll:TABLE") == {"a": "b"}
    for where in ("rule_atoll:NOT_A_TABLE", "rule_atoll:NO_SUCH", "no_such_atoll:TABLE"):
        with pytest.raises(LookupError):
            table(where)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("", ""),
        ("One. Two.", "One."),
        ("Goes\n    on. Two", "Goes on."),
        ("No end\n\nOther", "No end"),
        ("Since 1.2 it is so. Yes", "Since 1.2 it is so."),
    ],
)
def test_a_first_sentence_is_found(text: str, first: str) -> None:
    assert sentence(text) == first


class Garbage:
    """Only the collector finds it; like the log of a forgotten task, its end parses something."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        ast.parse("x = 1 + 2")


@pytest.mark.parametrize("on", [True, False])
def test_garbage_that_is_collected_meanwhile_breaks_no_parse(on: bool) -> None:
    """A server ended with "AST constructor recursion depth mismatch" when a task of a node that was
    gone was collected just then, and logged."""
    threshold = gc.get_threshold()
    gc.set_threshold(20)
    try:
        for _ in range(20):
            Garbage()
            reading._parsed.cache_clear()
            if not on:
                gc.disable()
            assert (
                read("atoll.aggregation.fedavg:FedAvg").where == "atoll.aggregation.fedavg:FedAvg"
            )
            assert gc.isenabled() == on
    finally:
        gc.enable()
        gc.set_threshold(*threshold)


def test_a_file_that_changes_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for size in (3, 4):
        (tmp_path / "changing_atoll.py").write_text(f"def rule(size: int = {size}):\n    pass\n")
        assert read("changing_atoll:rule").parameters[0].default == str(size)
