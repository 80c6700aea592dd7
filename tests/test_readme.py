"""README and docs keep their word: what they show exists, what is generated is up to date.

Their commands and programs are run by tests/slow/test_docs.py.
"""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest

from atoll.aggregation import FedAvg, FedBuff, FedCompass, Strategy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))
SHOWN = re.compile(r"^```py\n(.*?)^```", re.MULTILINE | re.DOTALL)
STRATEGIES = ROOT / "docs" / "strategies.md"


def test_the_readme_is_read_in_one_go() -> None:
    assert len(README.splitlines()) <= 170


def test_the_strategy_of_the_readme_is_the_example() -> None:
    (shown,) = re.findall(r"```python\n# own_strategy\.py\n(.*?)```", README, re.DOTALL)
    whole = (ROOT / "examples" / "own_strategy.py").read_text()
    assert shown == whole.split('"""\n\n', 1)[1]


def test_a_strategy_takes_twenty_lines() -> None:
    (code,) = re.findall(r"@dataclass\n(.*?)\n\n\nif", README, re.DOTALL)
    assert len(code.splitlines()) <= 20


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not heading or heading in headings(target.read_text()), f"{page}: {link}"
    for path in re.findall(r"`([a-z0-9_]+/[a-z0-9_/]+\.[a-z]+)`", text):
        assert (ROOT / path).exists(), f"{page}: {path}"


def headings(text: str) -> set[str]:
    """As GitHub makes anchors of them."""
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


def test_the_index_names_every_page_and_so_does_one_of_its_pages() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in PAGES[2:]:
        name = page.removeprefix("docs/")
        assert name == "index.md" or f"({name})" in index, name


@pytest.mark.parametrize("page", PAGES)
def test_calls_that_are_only_shown_fit_their_signatures(page: str) -> None:
    """Blocks ```py: their imports work, and what they call takes these arguments."""
    for block in SHOWN.findall((ROOT / page).read_text()):
        tree = ast.parse(block)
        names: dict[str, object] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("atoll"):
                module = importlib.import_module(node.module or "")
                names |= {alias.name: getattr(module, alias.name) for alias in node.names}
        assert names, f"{page}: a block that imports nothing of ours"
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                check_call(names.get(node.func.id), node)


def check_call(called: object, node: ast.Call) -> None:
    if callable(called):
        given = {k.arg: None for k in node.keywords if k.arg}
        inspect.signature(called).bind(*node.args, **given)


@pytest.mark.parametrize("strategy", [FedAvg, FedBuff, FedCompass])
def test_parameters_stand_on_their_page_as_in_the_code(
    strategy: type[Strategy], pytestconfig: pytest.Config
) -> None:
    """The tables are made from the fields and their comments; `pytest --rewrite` does it."""
    page = STRATEGIES.read_text()
    begin, end = f"<!-- parameters of {strategy.__name__} -->\n", "<!-- end -->"
    before, found, rest = page.partition(begin)
    assert found, f"no place for the parameters of {strategy.__name__}"
    shown, _, after = rest.partition(end)
    if pytestconfig.getoption("--rewrite"):
        STRATEGIES.write_text(before + begin + table(strategy) + end + after)
    else:
        assert shown == table(strategy), "pytest --rewrite tests/test_readme.py"


def table(strategy: type[Strategy]) -> str:
    """Markdown: each field that can be given, its default, and what its comment says."""
    source = inspect.getsource(strategy)
    lines = ["| parameter | default | |", "|---|---|---|"]
    for field in dataclasses.fields(strategy):  # type: ignore[arg-type]
        if field.init:
            said = re.search(rf"^    {field.name}: (.*?) = .*?(?:  # (.*))?$", source, re.MULTILINE)
            assert said, field.name
            kind = re.fullmatch(r"Literal\[(.*)\]", said[1])
            words = [f"{kind[1]}".replace('"', "`")] if kind else []
            words += [said[2]] if said[2] else []
            default = "" if field.default is None else f"`{field.default}`"
            lines.append(f"| `{field.name}` | {default} | {'; '.join(words)} |")
    return "\n".join(lines) + "\n"
