"""Slots: a built-in name, an entry point, or the user's own `module:object`, with parameters."""

import functools
import importlib.metadata
import json
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

from atoll.protocols import slots
from atoll.protocols.errors import UsageError
from tests.conftest import Package

BUILTIN = {
    "fedavg": "atoll.aggregation.fedavg:FedAvg",
    "version": "sys:version_info",
    "gone": "atoll.aggregation.gone:Gone",
}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("fedavg", ("fedavg", "", {})),
        ("fedavg:steps=5", ("fedavg", "", {"steps": 5})),
        ("fedavg:steps=5,lr=.1,x=a", ("fedavg", "", {"steps": 5, "lr": 0.1, "x": "a"})),
        ("fedavg:over-select=True", ("fedavg", "", {"over_select": True})),
        ("m.n:Class", ("m.n", "Class", {})),
        ("m.n:Class:lr=1e-3", ("m.n", "Class", {"lr": 0.001})),
        ("a:staleness=hinge:10:4", ("a", "", {"staleness": "hinge:10:4"})),
        (" a : b = 1 ", ("a", "", {"b": 1})),
    ],
)
def test_a_spec_is_name_object_and_parameters(
    spec: str, expected: tuple[str, str, dict[str, slots.Value]]
) -> None:
    assert slots.split(spec) == expected


@pytest.mark.parametrize("spec", ["fedavg:x=1,steps", "fedavg:=5", "m:Class:lr"])
def test_a_parameter_without_name_or_value_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="is not key=value") as caught:
        slots.split(spec)
    assert caught.value.code == "FL-S102"


@pytest.mark.parametrize("spec", ["fedavg:steps=1,steps=2", "fedavg:over-select=1,over_select=2"])
def test_a_parameter_given_twice_is_refused(spec: str) -> None:
    """The last one held, without a word: `--dp clip=1,noise=1,noise=0`."""
    with pytest.raises(UsageError, match="stands twice") as caught:
        slots.split(spec)
    assert caught.value.code == "FL-S102"


def test_a_builtin_is_made_with_its_parameters() -> None:
    from atoll.aggregation.fedavg import FedAvg

    made = slots.resolve("strategy", "fedavg:steps=7", BUILTIN)
    assert isinstance(made, FedAvg)
    assert made.steps == 7


def test_a_parameter_that_the_object_does_not_take_is_told() -> None:
    with pytest.raises(UsageError, match="it has no parameter 'stepz'") as caught:
        slots.resolve("strategy", "fedavg:stepz=7", BUILTIN)
    assert caught.value.code == "FL-S102"
    assert "steps=50" in caught.value.hint


@pytest.mark.parametrize("made", [Fraction, functools.partial(json.dumps, None), range])
def test_what_else_does_not_fit_is_told_as_python_says_it(made: Callable[..., object]) -> None:
    """Of a wrong type; of an object that takes what comes; of one that does not say what."""
    given = {"numerator": [1], "denominator": 2} if made is Fraction else {"x": 1}
    with pytest.raises(UsageError, match=r"Rational|argument") as caught:
        slots.call("part", "x", made, given)
    assert "has no parameter" not in caught.value.message


def test_parameters_are_listed_with_their_defaults_annotated_or_not() -> None:
    def made(x, *rest, y=3, z: int = 4):  # type: ignore[no-untyped-def]
        return x, rest, y, z

    with pytest.raises(UsageError) as caught:
        slots.call("part", "p", made, {"w": 1})
    assert caught.value.hint == "parameters: x, *rest, y=3, z=4"


def test_a_value_out_of_range_is_told_with_the_part_it_was_given_to() -> None:
    """A command has five parts with parameters, and several have a `seed` or an `lr`."""

    def half(f: float) -> None:
        raise UsageError("FL-S102", f"f={f:g}", "choose at most 0.49")

    def whole(f: float) -> None:
        raise UsageError("FL-S104", f"f={f:g} here", "")

    with pytest.raises(UsageError) as caught:
        slots.call("aggregator", "krum:f=0.6", half, {"f": 0.6})
    assert caught.value.message == "aggregator 'krum:f=0.6': f=0.6"
    assert (caught.value.code, caught.value.hint) == ("FL-S102", "choose at most 0.49")
    with pytest.raises(UsageError, match=r"FL-S104: f=0.6 here$"):
        slots.call("aggregator", "krum:f=0.6", whole, {"f": 0.6})


def test_an_object_that_is_not_called_takes_no_parameters() -> None:
    assert slots.resolve("x", "version", BUILTIN) is sys.version_info
    with pytest.raises(UsageError, match="takes no parameters") as caught:
        slots.resolve("x", "version:a=1", BUILTIN)
    assert caught.value.code == "FL-S102"


def test_a_name_nobody_knows_offers_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown strategy 'fedagv'") as caught:
        slots.find("strategy", "fedagv", BUILTIN)
    assert caught.value.code == "FL-S101"
    assert caught.value.hint.startswith("did you mean 'fedavg'? known: fedavg, gone, version")


def test_a_users_own_object_is_found_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_rule.py").write_text("class Rules:\n    class Mine:\n        size = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    found = slots.resolve("strategy", "my_own_rule:Rules.Mine", BUILTIN)
    assert getattr(found, "size", None) == 3


@pytest.mark.parametrize("spec", ["gone", "no_such_module_here:X", "json:no_such_name"])
def test_what_cannot_be_imported_is_told_with_the_reason(spec: str) -> None:
    with pytest.raises(UsageError, match="cannot be imported") as caught:
        slots.find("strategy", spec, BUILTIN)
    assert caught.value.code == "FL-S103"


MADE = "class Mine:\n    def __init__(self, size=3):\n        self.size = size\n"


@pytest.mark.parametrize(
    ("slot", "group"),
    [
        ("strategy", "strategies"),
        ("aggregator", "aggregators"),
        ("outer", "outers"),
        ("local algorithm", "locals"),
        ("codec", "codecs"),
        ("model", "models"),
    ],
)
def test_an_installed_package_adds_a_name_to_a_slot(
    package: Package, slot: str, group: str
) -> None:
    package("theirs_atoll", MADE, **{group: "mine = theirs_atoll:Mine"})
    assert getattr(slots.resolve(slot, "mine:size=5", BUILTIN), "size", None) == 5
    with pytest.raises(UsageError, match="unknown trainer 'mine'"):
        slots.find("trainer", "mine", BUILTIN)
    with pytest.raises(UsageError, match="did you mean 'mine'"):
        slots.find(slot, "mone", {})


def test_a_name_that_two_packages_offer_is_refused_with_both(package: Package) -> None:
    package("theirs_atoll", MADE, strategies="mine = theirs_atoll:Mine")
    package("others_atoll", MADE, strategies="mine = others_atoll:Mine")
    with pytest.raises(UsageError) as caught:
        slots.find("strategy", "mine", BUILTIN)
    assert caught.value.code == "FL-S110"
    assert "package 'others_atoll' and by package 'theirs_atoll'" in caught.value.message
    assert slots.find("strategy", "theirs_atoll:Mine", BUILTIN)


def test_a_package_cannot_take_the_name_of_a_built_in_part(package: Package) -> None:
    package("theirs_atoll", MADE, strategies="fedavg = theirs_atoll:Mine")
    with pytest.raises(UsageError) as caught:
        slots.find("strategy", "fedavg", BUILTIN)
    assert caught.value.code == "FL-S110"
    assert caught.value.message == (
        "strategy 'fedavg' is offered by Atoll itself and by package 'theirs_atoll'"
    )
    assert caught.value.hint == "uninstall one, or name yours as theirs_atoll:Mine"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import no_such_module_here\n", "No module named 'no_such_module_here'"),
        ("", "has no attribute 'Mine'"),
        ("1 / 0\n", "ZeroDivisionError"),
        ("class Mine(\n", "SyntaxError"),
        ("raise SystemExit(3)\n", r"it calls sys.exit\(3\)"),
    ],
)
def test_a_broken_package_is_one_error_that_names_it(package: Package, code: str, why: str) -> None:
    package("theirs_atoll", code, codecs="mine = theirs_atoll:Mine")
    with pytest.raises(UsageError, match=why) as caught:
        slots.find("codec", "mine", BUILTIN)
    assert caught.value.code == "FL-S103"
    assert "of package 'theirs_atoll'" in caught.value.message


SUMS = "def Mine():\n    return 1 + 'a'\n"
LEAVES = "import sys\nclass Mine:\n    def __init__(self):\n        sys.exit()\n"
FAILS = "class Mine:\n    def __init__(self):\n        {}['size']\n"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("1 / 0\n", "fails when it is imported: ZeroDivisionError: division by zero"),
        ("class Mine(\n", "fails when it is imported: SyntaxError: '(' was never closed (theirs_a"),
        (FAILS, "fails when it is made: KeyError: 'size'"),
        ("raise SystemExit('bye')\n", "fails when it is imported: it calls sys.exit('bye')"),
        (
            SUMS,
            "fails when it is made: TypeError: unsupported operand",
        ),  # FL-S102, parameters: none
        (LEAVES, "fails when it is made: it calls sys.exit(None)"),  # the command ended, with 0
    ],
)
def test_a_mistake_in_a_users_own_module_is_one_error_that_says_which(
    package: Package, code: str, said: str
) -> None:
    """It was told as a bug of ours, with a crash file to report."""
    package("theirs_atoll", code)
    with pytest.raises(UsageError) as caught:
        slots.resolve("codec", "theirs_atoll:Mine", BUILTIN)
    assert caught.value.code == "FL-S103"
    assert said in caught.value.message
    assert caught.value.hint == "mend it: -v shows where"


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("", "mend it: -v shows where"),
        ("class Mini: ...\n", "did you mean 'Mini'?"),
        ("import no_such_module_here\n", "mend it: -v shows where"),  # it was the path's fault
        ("from json import no_such_name\n", "mend it: -v shows where"),
    ],
)
def test_what_is_not_in_a_users_module_is_no_matter_of_paths(
    package: Package, code: str, hint: str
) -> None:
    package("theirs_atoll", code)
    with pytest.raises(UsageError, match="cannot be imported") as caught:
        slots.find("codec", "theirs_atoll:Mine", BUILTIN)
    assert (caught.value.code, caught.value.hint) == ("FL-S103", hint)
    with pytest.raises(UsageError) as caught:
        slots.find("codec", "theirs_atol:Mine", BUILTIN)
    assert caught.value.hint == "check the path and PYTHONPATH"


def test_ctrl_c_while_a_users_module_is_imported_goes_on(package: Package) -> None:
    package("theirs_atoll", "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        slots.resolve("codec", "theirs_atoll:Mine", BUILTIN)


@pytest.mark.parametrize("spec", ["fedavg:steps=x", "fedavg:steps=", "fedavg:cohort=all"])
def test_text_where_a_number_is_wanted_is_told(spec: str) -> None:
    """It was told as "'>=' not supported between instances of 'str' and 'int'"."""
    name, _, value = spec.partition(":")[2].partition("=")
    with pytest.raises(UsageError, match=f"{name}='{value}' is no number") as caught:
        slots.resolve("strategy", spec, BUILTIN)
    assert caught.value.code == "FL-S102"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("fedavg:steps=1.5", "steps=1.5 is no whole number"),
        ("fedavg:steps=inf", "steps=inf is no whole number"),
        ("fedavg:cohort=2.0", "cohort=2.0 is no whole number"),
        ("fedavg:deadline=nan", "deadline=nan is no number"),
    ],
)
def test_what_is_no_whole_number_or_none_at_all_is_told(spec: str, said: str) -> None:
    """The run began, and failed on the first client as "the strategy failed: mend it"."""
    with pytest.raises(UsageError) as caught:
        slots.resolve("strategy", spec, BUILTIN)
    assert (caught.value.code, caught.value.message) == ("FL-S102", f"strategy {spec!r}: {said}")
    assert "steps=50" in caught.value.hint


@pytest.mark.parametrize(
    "given",
    ["steps=99999999999999999999999", "steps=9007199254740993", "min_clients=-9007199254740993",
     f"deadline={'9' * 400}"],
)  # fmt: skip
def test_a_number_that_no_message_takes_is_refused(given: str) -> None:
    """The run began, and its server failed on the first client, or each client on its order."""
    with pytest.raises(UsageError) as caught:
        slots.resolve("strategy", f"fedavg:{given}", BUILTIN)
    name = given.partition("=")[0]
    assert caught.value.code == "FL-S102"
    assert caught.value.message == f"'fedavg:{given}': {name} is more than a message takes"
    assert caught.value.hint == "choose at most 9007199254740992"
    slots.resolve("strategy", "fedavg:steps=9007199254740992", BUILTIN)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("fedcompass:flush_on_stop=no", "flush_on_stop='no' is neither true nor false"),
        ("fedcompass:normalised=0", "normalised=0 is neither true nor false"),
        ("fedcompass:min_steps=true", "min_steps=True is no number"),
        ("fedcompass:slack=false", "slack=False is no number"),
    ],
)
def test_a_truth_value_is_true_or_false_and_no_number(spec: str, said: str) -> None:
    """`--dp adaptive=no` let the clip adapt: every text but an empty one counted as true."""
    with pytest.raises(UsageError) as caught:
        slots.resolve("strategy", spec, {"fedcompass": "atoll.aggregation:FedCompass"})
    assert (caught.value.code, caught.value.message) == ("FL-S102", f"strategy {spec!r}: {said}")


def test_a_truth_value_without_a_type_is_known_by_its_default() -> None:
    def made(loud=False):  # type: ignore[no-untyped-def]  # as users write them
        return loud

    with pytest.raises(UsageError, match="loud='yes' is neither true nor false"):
        slots.call("model", "own:made", made, {"loud": "yes"})
    assert slots.call("model", "own:made", made, {"loud": True}) is True


def test_a_parameter_without_a_value_is_no_module_of_ones_own(package: Package) -> None:
    """`fedavg:steps` was looked for in a module called fedavg."""
    with pytest.raises(UsageError, match="'fedavg:steps': 'steps' is not key=value") as caught:
        slots.find("strategy", "fedavg:steps", BUILTIN)
    assert caught.value.code == "FL-S102"
    package("fedavg", MADE)  # unless there is one
    assert slots.resolve("strategy", "fedavg:Mine", BUILTIN)


def test_what_is_said_where_no_package_is_known() -> None:
    point = importlib.metadata.EntryPoint("theirs", "math:sqrt", "atoll.strategies")
    assert slots.offerer(point) == "an installed package"


def test_the_same_part_offered_twice_is_one(package: Package) -> None:
    package("theirs_atoll", MADE, strategies="mine = theirs_atoll:Mine")
    package("others_atoll", MADE, strategies="mine = theirs_atoll:Mine")
    assert slots.resolve("strategy", "mine", BUILTIN)
