"""The repository as a whole: nothing that runs foreign code, no machine's paths, no lost code.

What holds for every file is held here by reading every file: no reviewer has to remember it.
"""

import ast
import functools
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from atoll.protocols.errors import CATALOGUE

ROOT = Path(__file__).parents[1]
PRODUCT = ("aggregation", "client", "p2p", "protocols", "server")
EVERYWHERE = (*PRODUCT, "benchmarks", "examples", "tests")

RUNS_WHAT_IT_READS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
# One of these words is in every text in which `unsafe` finds anything; most texts need no parsing.
SUSPECT = re.compile(
    rf"\b(?:{'|'.join(RUNS_WHAT_IT_READS)}"
    r"|torch\s*\.\s*load|allow_pickle|eval|exec|__import__|shell|system|popen)\b"
)
WALL_CLOCK = {
    "time.time",
    "time.time_ns",
    "datetime.now",
    "datetime.datetime.now",
    "datetime.utcnow",
}
ENVIRONMENT = {"os.environ", "os.getenv", "os.putenv"}
IMPURE_FOR_A_REASON = {
    "protocols/children.py": {"os.environ"},  # what a child process gets of ours
    "protocols/console.py": {"os.environ"},  # NO_COLOR and TERM, for people's terminals
    "protocols/entry.py": {"os.environ"},  # what gRPC shall say there
    "protocols/poller.py": {"os.environ"},  # how gRPC shall wait there
    "protocols/ids.py": {"time.time"},  # the time in a ULID; drivers make them, machines never
}


def files(*folders: str) -> list[Path]:
    found = [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]
    return [p for p in found if "_pb2" not in p.name]


@functools.cache
def parsed(file: Path) -> ast.Module:
    """Read once for all that look into it."""
    return ast.parse(file.read_text())


def dotted(node: ast.AST) -> str:
    """`torch.load` of such an expression; of `f(x).load` only ".load"."""
    match node:
        case ast.Attribute(value, name):
            return f"{dotted(value)}.{name}"
        case ast.Name(name):
            return name
    return ""


def calls(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, ast.Call]]:
    """Each call with what is called, dotted: ("torch.load", ...)."""
    for node in nodes:
        if isinstance(node, ast.Call):
            yield dotted(node.func), node


def given(call: ast.Call, name: str, default: str) -> str:
    """A keyword argument as it is written."""
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), default)


def nodes_of(tree: ast.AST) -> Iterator[ast.AST]:
    """As ast.walk, in a third of its time."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        for value in vars(node).values():
            if isinstance(value, ast.AST):
                todo.append(value)
            elif isinstance(value, list):
                todo += [child for child in value if isinstance(child, ast.AST)]


def unsafe(tree: ast.AST) -> list[str]:
    """What in a file can run code out of data."""
    nodes = [n for n in nodes_of(tree) if isinstance(n, ast.Import | ast.ImportFrom | ast.Call)]
    names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    found = [n for n in names if n.split(".")[0] in RUNS_WHAT_IT_READS]
    for name, call in calls(nodes):
        if name.endswith("torch.load") and given(call, "weights_only", "") != "True":
            found.append("torch.load without weights_only=True")
        if "load" in name and given(call, "allow_pickle", "False") != "False":
            found.append(f"{name} with allow_pickle")
        if name in ("eval", "exec", "__import__"):
            found.append(name)
        if given(call, "shell", "False") != "False" or name in ("os.system", "os.popen"):
            found.append(f"{name} through a shell")
    return found


def impure(tree: ast.AST) -> list[str]:
    """What in a file reads the wall clock, the environment or a global random generator."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = dotted(node)
            if name in WALL_CLOCK | ENVIRONMENT:
                found.append(name)
            if re.fullmatch(r"(random|np\.random|numpy\.random)\.[a-z_]+", name):
                found += [] if name.endswith((".default_rng", ".random")) else [name]
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "time", "random"):
            found += [
                f"{node.module}.{a.name}"
                for a in node.names
                if f"{node.module}.{a.name}" in WALL_CLOCK | ENVIRONMENT
                or (node.module == "random" and a.name != "Random")
            ]
    for name, call in calls(ast.walk(tree)):
        if name.split(".")[-1] in ("Random", "default_rng") and not call.args:
            found.append(f"{name} without a seed")
        if name in ("random.random", "np.random.random", "torch.manual_seed"):
            found.append(name)
    return found


@pytest.mark.parametrize("folder", EVERYWHERE)
def test_nothing_runs_code_out_of_data(folder: str) -> None:
    for file in files(folder):
        assert not SUSPECT.search(file.read_text()) or not unsafe(parsed(file)), file


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from cloudpickle import loads",
        "def f():\n    import dill",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "eval(x)",
        "subprocess.run(x, shell=True)",
        "os.system(x)",
        "os.popen(x)",
        "__import__(x)",
        "exec(x)",
        *(f"import {name}.own" for name in sorted(RUNS_WHAT_IT_READS)),
    ],
)
def test_code_out_of_data_would_be_seen(text: str) -> None:
    assert SUSPECT.search(text)
    assert unsafe(ast.parse(text))


def test_what_is_safe_is_let_through() -> None:
    text = "torch.load(p, weights_only=True)\nnp.load(p, allow_pickle=False)\nmodel.eval()\n"
    assert unsafe(ast.parse(text)) == []


@pytest.mark.parametrize("folder", ["protocols", "aggregation"])
def test_the_core_reads_no_clock_no_environment_and_no_global_randomness(folder: str) -> None:
    for file in files(folder):
        reasons = IMPURE_FOR_A_REASON.get(f"{folder}/{file.name}", set())
        assert set(impure(parsed(file))) == reasons, file


@pytest.mark.parametrize(
    "text",
    [
        "time.time()",
        "from time import time",
        "os.environ['X']",
        "from os import getenv",
        "random.random()",
        "random.shuffle(x)",
        "from random import choice",
        "random.Random()",
        "np.random.default_rng()",
        "np.random.rand(3)",
        "datetime.datetime.now()",
    ],
)
def test_impurity_would_be_seen(text: str) -> None:
    assert impure(ast.parse(text))


def test_a_seeded_generator_is_let_through() -> None:
    assert impure(ast.parse("random.Random(seed).random()\nnp.random.default_rng(3)")) == []


def tracked() -> list[Path]:
    """Every text file that git knows, and those not yet added."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    names = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [p for p in names if p.is_file() and not p.is_symlink() and p.suffix != ".png"]


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    homes = ("work", "home", "root", "Users", "opt", "mnt")
    machine = re.compile(r"(?<![\w.~$}/-])/(?:" + "|".join(homes) + r")/\w")
    for path in tracked():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            assert not machine.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_a_page_that_the_code_names_is_there() -> None:
    for file in files(*PRODUCT, "examples"):
        for page in re.findall(r"docs/[\w./-]+\.md", file.read_text()):
            assert (ROOT / page).exists(), f"{file.name} sends its reader to {page}"


def product() -> str:
    """All code but the error catalogue."""
    return "".join(p.read_text() for p in files(*PRODUCT) if p.name != "errors.py")


def test_every_code_that_is_named_stands_in_the_catalogue() -> None:
    assert set(re.findall(r"FL-[A-Z]\d{3}", product())) - set(CATALOGUE) == set()


def test_every_code_of_the_catalogue_is_raised_somewhere() -> None:
    """As a string of its own: to be spoken of is not enough."""
    assert set(CATALOGUE) - set(re.findall(r'"(FL-[A-Z]\d{3})"', product())) == set()


def test_every_code_of_the_catalogue_has_a_test() -> None:
    own = {"test_errors.py", "test_repository.py"}  # these speak of all codes, and test none
    text = "".join(p.read_text() for p in files("tests") if p.name not in own)
    assert {code for code in CATALOGUE if code not in text} == set()


def test_functions_fit_a_screen() -> None:
    """60 lines at most: what is longer holds a second idea."""
    for file in files(*PRODUCT):
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{file.name}: {node.name} has {length} lines"


def test_every_module_opens_with_what_it_is_for() -> None:
    for file in files(*PRODUCT, "benchmarks", "examples"):
        said = ast.get_docstring(parsed(file)) or ""
        assert said.split("\n")[0].strip().endswith((".", ":", "?")), f"{file}: {said[:60]!r}"
