"""Page: run the recipes, and write docs/science.md from what they leave.

    python benchmarks/science/page.py [NAME ...] [--jobs 2] [--write]

Without names all run, each in a process of its own, the longest first; with --write none does. The
page shows every recipe whose JSON lies in docs/science/, those of former runs too. Exit 1 where one
falls short.
"""

import argparse
import concurrent.futures
import importlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipe import PAGES, ROOT, Recipe, say

HERE = Path(__file__).parent
TOOLS = {"recipe", "page", "mnist"}
HEAD = """# Science

Does each method do here what its paper says? Every recipe runs on real data with fixed seeds, in virtual time where time matters. `make prove-science` runs all and writes this page; `make prove-science ARGS=fedcompass` runs one. What is **asserted** fails the command when it does not hold; what is *compared* is shown either way, since a small recipe on two cores is not the paper's setting. Where we disagree with a paper, the last column says "no" and the numbers stand beside it.
"""  # noqa: E501  a paragraph is a line


def recipes() -> dict[str, Recipe]:
    """All of them, by name: each file here with a RECIPE."""
    found = {}
    for path in sorted(HERE.glob("*.py")):
        if path.stem not in TOOLS:
            made = importlib.import_module(path.stem).RECIPE
            assert made.name == path.stem, f"{path.name} calls its recipe {made.name!r}"
            found[made.name] = made
    return found


def run(name: str, missing: str = "") -> bool:
    """In a process of its own, which writes its JSON and its picture; False: it fell short.

    Where it ends without a result, the former one stays on the page.
    """
    if missing:
        say(f"{name}: {missing}; the page keeps what was measured before")
        return True
    say(f"{name}: begun")
    done = subprocess.run(
        [sys.executable, str(HERE / f"{name}.py")], capture_output=True, text=True
    )
    if done.returncode not in (0, 1) or not done.stdout:
        say(f"{name}: FAILED, the page keeps what was measured before\n{done.stderr}")
        return False
    told = json.loads(done.stdout.splitlines()[-1])
    print(done.stdout.splitlines()[-1], flush=True)
    for claim in told["claims"]:
        if not claim["held"]:
            say(f"{name}: {'NOT HELD' if claim['asserted'] else 'not held'}: {claim['says']}"
                f" ({claim['found']})")  # fmt: skip
    say(f"{name}: {told['minutes']} of {told['budget_minutes']} minutes, ok: {told['ok']}")
    return bool(told["ok"])


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole of docs/science.md."""
    parts = [HEAD]
    parts += [
        "| recipe | asserted | compared | minutes of a core (budget) |\n|---|---|---|---|\n"
        + "".join(_line(told) for told in results.values())
    ]
    parts += [_section(told) for told in results.values()]
    return "\n".join(parts)


def _line(told: Mapping[str, Any]) -> str:
    def held(asserted: bool) -> str:
        claims = [c["held"] for c in told["claims"] if c["asserted"] == asserted]
        return f"{sum(claims)} of {len(claims)} held" if claims else "-"

    minutes = f"{told['minutes']:.1f} ({told['budget_minutes']:g})"
    return f"| [{told['title']}](#{told['recipe']}) | {held(True)} | {held(False)} | {minutes} |\n"


def _section(told: Mapping[str, Any]) -> str:
    name = told["recipe"]
    claims = "".join(
        f"| {c['says']} | {c['source'] or '-'} | {c['found']} |"
        f" {'**asserted**' if c['asserted'] else '*compared*'} |"
        f" {'yes' if c['held'] else '**no**'} |\n"
        for c in told["claims"]
    )  # fmt: skip
    said = f"\n{told['said'].strip()}\n" if told["said"] else ""
    return (
        f'<a id="{name}"></a>\n\n## {told["title"]}\n\n'
        f"[The paper]({told['paper']}); the recipe is"
        f" [benchmarks/science/{name}.py](../benchmarks/science/{name}.py).\n\n"
        f"{_paragraphs(told['setting'])}\n\n![{told['title']}](science/{name}.png)\n\n"
        f"{_table(told['columns'], told['rows'])}{said}\n"
        f"| expected | by | found | | held |\n|---|---|---|---|---|\n{claims}"
    )


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _paragraphs(text: str) -> str:
    """A docstring's lines joined, since a page's paragraph is one line."""
    return "\n\n".join(" ".join(block.split()) for block in text.split("\n\n"))


def main() -> None:
    known = recipes()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    parser.add_argument("--write", action="store_true", help="run nothing, only write the page")
    parser.add_argument("--jobs", type=int, default=2, help="at a time  [default: 2]")
    given = parser.parse_args()
    wrong = sorted(set(given.names) - set(known))
    if wrong:
        parser.error(f"no recipe {wrong[0]!r}; there are {', '.join(known)}")
    wanted = given.names or ([] if given.write else known)
    chosen = sorted(wanted, key=lambda name: -known[name].minutes)
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        fine = list(pool.map(lambda name: run(name, known[name].missing()), chosen))
    lying = [PAGES / f"{name}.json" for name in known]
    results = {path.stem: json.loads(path.read_text()) for path in lying if path.exists()}
    (ROOT / "docs" / "science.md").write_text(page(results))
    skipped = sum(bool(known[name].missing()) for name in chosen)
    say(
        f"{sum(fine) - skipped} of {len(fine)} recipes held, {skipped} skipped; see docs/science.md"
    )
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
