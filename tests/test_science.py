"""The recipes of benchmarks/science/: what they share, and that all of them fit in an hour."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

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
