"""README and docs keep their word: what they show exists, what is generated is up to date.

Their commands and programs are run by tests/slow/test_docs.py.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

from atoll.protocols.facts import TOKENS
from atoll.server.catalogue import MIXED, Part, offers, parts

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))
SHOWN = re.compile(r"^```py\n(.*?)^```", re.MULTILINE | re.DOTALL)


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
    """As GitHub makes anchors of them, and those that are spelled out."""
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    spelled = set(re.findall(r"<a id=\"([\w-]+)\">", text))
    return spelled | {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


@pytest.mark.parametrize("page", PAGES[2:])
def test_the_index_of_its_folder_names_a_page(page: str) -> None:
    path = ROOT / page
    index = path.with_name("index.md")
    if path == index:
        index, named = path.parents[1] / "index.md", f"{path.parent.name}/index.md"
        if path.parent.name == "docs":
            return
    else:
        named = path.name
    assert f"({named})" in index.read_text(), page


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


# ---- tables of parameters ------------------------------------------------------------------

TABLE = re.compile(r"<!-- parameters of (.+) -->\n((?:.*\n)*?)<!-- end -->")
DESCRIBED = ("strategy", "aggregator", "outer", "local algorithm")
PARTS = {f"{slot} {part.names[0]}": part for slot in MIXED for part in parts(slot)}
PAGES_OF_PARTS = sorted((ROOT / "docs" / "strategies").glob("*.md"))


@pytest.mark.parametrize("page", PAGES_OF_PARTS, ids=lambda page: page.name)
def test_parameters_stand_on_their_page_as_in_the_code(
    page: Path, pytestconfig: pytest.Config
) -> None:
    """The tables are made from the fields and their comments; `pytest --rewrite` does it."""
    text = page.read_text()
    wanted = TABLE.sub(lambda found: made(found[1]), text)
    if pytestconfig.getoption("--rewrite"):
        page.write_text(wanted)
    else:
        assert text == wanted, "pytest --rewrite tests/test_readme.py"


def test_every_part_with_parameters_has_its_table() -> None:
    shown = {name for page in PAGES_OF_PARTS for name, _ in TABLE.findall(page.read_text())}
    wanted = {name for name, p in PARTS.items() if p.parameters and p.entry.slot in DESCRIBED}
    assert wanted <= shown, "give it a page in docs/strategies, with <!-- parameters of ... -->"


def test_the_words_of_composition_stand_as_in_the_code(pytestconfig: pytest.Config) -> None:
    page = ROOT / "docs" / "strategies" / "composition.md"
    text = page.read_text()
    begin, end = "<!-- words -->\n", "<!-- end of words -->"
    before, after = text.partition(begin)[0], text.partition(end)[2]
    wanted = before + begin + words() + end + after
    if pytestconfig.getoption("--rewrite"):
        page.write_text(wanted)
    else:
        assert text == wanted, "pytest --rewrite tests/test_readme.py"


def words() -> str:
    """Markdown: each word, what it means, and who gives, needs and refuses it."""
    lines = ["| word | needs, gives or refuses ... | given by | needed by | refused by |"]
    lines.append("|---|---|---|---|---|")
    there = list(offers())
    for token, meaning in TOKENS.items():
        said = []
        for what in ("gives", "needs", "refuses"):
            names = dict.fromkeys(f.name for f in there if token in getattr(f, what))
            said.append(", ".join(f"`{name}`" for name in names))
        lines.append(f"| `{token}` | {meaning} | {' | '.join(said)} |")
    return "\n".join(lines) + "\n"


def made(name: str) -> str:
    assert name in PARTS, f"no part {name!r}"
    return f"<!-- parameters of {name} -->\n{table(PARTS[name])}<!-- end -->"


def table(part: Part) -> str:
    """Markdown: each parameter, its default, and what its comment says."""
    lines = [f"| `{part.names[0]}` | default | |", "|---|---|---|"]
    for p in part.parameters:
        words = [", ".join(f"`{choice}`" for choice in p.choices)] if p.choices else []
        words += [p.says] if p.says else []
        assert words, f"{part.names[0]}: {p.name} has no comment"
        default = "" if p.default in (None, "None") else f"`{p.default}`"
        lines.append(f"| `{p.name}` | {default} | {'; '.join(words)} |")
    return "\n".join(lines) + "\n"
