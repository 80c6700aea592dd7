"""The recipes of benchmarks/science/: what they share, and that all of them fit in an hour."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "science"
CORES, HOUR = 2, 60.0


@pytest.fixture(scope="module")
def page() -> Iterator[ModuleType]:
    """`page.py`, imported as it imports itself: its folder first on the path."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    import page  # type: ignore[import-not-found]

    yield page
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_all_recipes_fit_in_an_hour_on_two_cores(page: ModuleType) -> None:
    budgets = [recipe.minutes for recipe in page.recipes().values()]
    assert budgets
    assert sum(budgets) / CORES <= HOUR
    assert max(budgets) <= HOUR


def finding(page: ModuleType, held: bool, asserted: bool) -> object:
    recipe = sys.modules["recipe"]
    claim = recipe.Claim("a before b", "1 s, 2 s", held, asserted, "spec 7")
    picture = recipe.curves({"exp": {"a": [[(0.0, 0.1), (1.0, 0.9)]]}}, "s", "accuracy")
    return recipe.Finding(["x", "y"], [["a", 0.12345], ["b", None]], [claim], picture, "Mind this.")


@pytest.mark.parametrize(
    ("held", "asserted", "ok"), [(True, True, True), (False, True, False), (False, False, True)]
)
def test_only_an_asserted_claim_can_fail_a_recipe(
    page: ModuleType, tmp_path: Path, held: bool, asserted: bool, ok: bool
) -> None:
    recipe = sys.modules["recipe"]
    made = recipe.Recipe("r", "R", 1.0, "https://x", lambda quick: finding(page, held, asserted))
    told = recipe.carried_out(made, False, tmp_path)
    assert told["ok"] is ok
    assert told["rows"] == [["a", "0.1235"], ["b", "-"]]
    assert json.loads((tmp_path / "r.json").read_text()) == told
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert recipe.carried_out(made, True, None)["ok"] is True  # a short look asserts nothing


def test_over_its_budget_a_recipe_fails(page: ModuleType) -> None:
    recipe = sys.modules["recipe"]
    made = recipe.Recipe("r", "R", 0.0, "https://x", lambda quick: finding(page, True, True))
    assert recipe.carried_out(made, False, None)["ok"] is False


def test_the_page_says_where_a_paper_is_not_met(page: ModuleType) -> None:
    recipe = sys.modules["recipe"]
    made = recipe.Recipe("r", "R", 1.0, "https://x", lambda quick: finding(page, False, False))
    text = page.page({"r": recipe.carried_out(made, False, None)})
    assert "| a before b | spec 7 | 1 s, 2 s | *compared* | **no** |" in text
    assert "| [R](#r) | - | 0 of 1 held | 0.0 (1) |" in text
    assert "| a | 0.1235 |" in text
    assert "Mind this." in text


@pytest.mark.parametrize("owners", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_classes_have_their_owners_and_every_row_has_one(
    page: ModuleType, seed: int, owners: int
) -> None:
    labels = np.repeat(np.arange(10), 60)
    page.recipes()  # imports mnist
    cut = sys.modules["mnist"].class_partition
    parts = cut(SimpleNamespace(labels=lambda: labels), 5, 5, 6, seed, owners)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    held = [set(labels[rows]) for rows in parts]
    assert all(len(classes) in (5, 6) for classes in held)
    assert min(sum(value in classes for classes in held) for value in range(10)) >= owners


RECIPES = {
    "crash": "raise SystemExit('out of memory')",
    "short": "return Finding(['n'], [['new']], [Claim('a', 'b', False)], lambda figure: None)",
    "fine": "return Finding(['n'], [['new']], [Claim('a', 'b', True)], lambda figure: None)",
    "dataless": "raise AssertionError('it was run')",
}
SOURCE = """'''Title.

Setting.
'''
from pathlib import Path

from recipe import Claim, Finding, Recipe, main

def run(quick):
    {body}

RECIPE = Recipe({name!r}, {name!r}, 1.0, "https://x", run{needs})

if __name__ == "__main__":
    main(RECIPE)
"""


def folder_of_recipes(tmp_path: Path) -> Path:
    """A checkout with made-up recipes, each of which was measured before."""
    science, pages = tmp_path / "benchmarks" / "science", tmp_path / "docs" / "science"
    science.mkdir(parents=True)
    pages.mkdir(parents=True)
    for name in ("recipe.py", "page.py"):
        (science / name).write_text((FOLDER / name).read_text())
    for name, body in RECIPES.items():
        needs = ', needs=Path("absent.txt").resolve()' if name == "dataless" else ""
        (science / f"{name}.py").write_text(SOURCE.format(name=name, body=body, needs=needs))
        (pages / f"{name}.json").write_text(json.dumps({
            "recipe": name, "ok": True, "minutes": 0.5, "budget_minutes": 1, "title": name,
            "paper": "https://x", "setting": "", "columns": ["n"], "rows": [[f"old {name}"]],
            "claims": [], "said": "",
        }))  # fmt: skip
    return science


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "code"),
    [
        pytest.param(["crash", "fine"], 1, marks=pytest.mark.long),
        (["short", "fine"], 1),
        (["dataless", "fine"], 0),
    ],
)
def test_one_command_fails_with_any_recipe_and_keeps_what_was_measured(
    tmp_path: Path, names: list[str], code: int
) -> None:
    science = folder_of_recipes(tmp_path)
    command = [sys.executable, str(science / "page.py"), *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == code, done.stderr
    text = (tmp_path / "docs" / "science.md").read_text()
    assert ("old crash" in text, "old dataless" in text) == (True, True)
    assert "old fine" not in text  # it ran
    assert ("old short" in text) is ("short" not in names)
    if "crash" in names:
        assert "crash: FAILED, the page keeps what was measured before" in done.stderr
        assert "out of memory" in done.stderr
    if "short" in names:
        assert "short: NOT HELD: a (b)" in done.stderr
        assert "| a | - | b | **asserted** | **no** |" in text
    if "dataless" in names:
        assert "dataless: skipped: absent.txt is not there" in done.stderr
        assert "1 of 2 recipes held, 1 skipped" in done.stderr
