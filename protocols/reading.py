"""Reading: what a class is, out of its source, without running it.

`fl-server aggregators` must not wait for torch, nor run the code of every package that offers one.
So facts, summary, paper and parameters are read from the syntax tree. A test holds them to what the
imported class says.
"""

import ast
import functools
import gc
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

URL = re.compile(r"https?://[^\s)>,;]+[^\s)>,;.:]")


@dataclass(frozen=True, slots=True)
class Parameter:
    """What can be given: `name:parameter=default`."""

    name: str
    default: str | None  # as it is written in the code; None: must be given
    says: str  # its comment
    kind: str = ""  # as annotated

    @property
    def choices(self) -> tuple[str, ...]:
        """Of a Literal, what it can be."""
        found = re.fullmatch(r"Literal\[(.*)\]", self.kind)
        return tuple(part.strip("'\" ") for part in found[1].split(",")) if found else ()


@dataclass(frozen=True)
class Source:
    """A class or a function as its file has it."""

    where: str  # module:object
    summary: str  # the first sentence of its docstring
    about: str  # the first line of its module's: "Krum: the update whose ..."
    papers: tuple[str, ...]  # URLs
    parameters: tuple[Parameter, ...]
    attributes: Mapping[str, object] = field(default_factory=dict)  # literals at class level
    computed: frozenset[str] = frozenset()  # attributes that only a made object knows


def read(where: str) -> Source:
    """The class or function at `module:object`. LookupError where there is no source to read."""
    module, _, name = where.partition(":")
    return _read(where, _tree(module), name)


def table(where: str) -> dict[str, str]:
    """The dict of texts at `module:NAME`. LookupError where it is not there, or no literal."""
    module, _, name = where.partition(":")
    tree = _tree(module)
    for node in tree.body:
        target, value = _assigned(node)
        if target == name and value is not None:
            found = _literal(value)
            if isinstance(found, dict):
                return found
    origin = tree.origin(name)
    if origin is None:
        raise LookupError(f"no table {where}")
    return table(":".join(origin))


# ---- modules -------------------------------------------------------------------------------


def _tree(module: str) -> "_Module":
    path = locate(module)
    if path is None:
        raise LookupError(f"no source of {module}")
    try:
        text = path.read_text(encoding="utf-8")
        return _Module(module, _parsed(text), text.splitlines())
    except (OSError, SyntaxError, ValueError) as error:
        raise LookupError(f"{path} cannot be read: {error}") from error


@functools.lru_cache(maxsize=128)  # a check at start reads the same few dozen again and again
def _parsed(text: str) -> list[ast.stmt]:
    """Its statements, of functions only the first of theirs: nobody looks further.

    Made without a garbage collection in the midst of it: where that logs what became of a forgotten
    task, Python 3.11 parses the lines of its traceback, and then takes the interrupted parse for a
    broken one (SystemError)."""
    collects = gc.isenabled()
    gc.disable()
    try:
        body = ast.parse(text).body
    finally:
        if collects:
            gc.enable()
    for node in body:
        for inner in (node, *(node.body if isinstance(node, ast.ClassDef) else ())):
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                del inner.body[1:]
    return body


def locate(module: str) -> Path | None:
    """Its file. Only packages of Atoll are imported on the way, which cost nothing."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(module if top == "atoll" else top)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None:
        return None
    if top == "atoll" or not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        base = Path(folder).joinpath(*rest)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.exists():
                return path
    return None


@dataclass(frozen=True)
class _Module:
    name: str
    body: list[ast.stmt]
    lines: list[str]

    def named(self, name: str) -> ast.stmt | None:
        kinds = (ast.ClassDef, ast.FunctionDef)
        found = (n for n in self.body if isinstance(n, kinds) and n.name == name)
        return next(found, None)

    def origin(self, name: str) -> tuple[str, str] | None:
        """(module, name) of what `from module import name` brings here."""
        for outer in self.body:
            within = ast.walk(outer) if isinstance(outer, ast.If | ast.Try) else [outer]
            for node in within:  # a lazy package imports for type checkers alone
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    for alias in node.names:
                        if (alias.asname or alias.name) == name:
                            return node.module, alias.name
        return None

    def comment(self, node: ast.stmt | ast.expr | ast.arg) -> str:
        """What stands behind a field or an argument, on its last line."""
        assert node.end_lineno is not None
        rest = self.lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
        rest = rest.strip(" ,")
        return rest.removeprefix("#").strip() if rest.startswith("#") else ""


# ---- classes and functions -----------------------------------------------------------------


def _read(where: str, module: _Module, name: str) -> Source:
    node = module.named(name)
    if node is None:
        origin = module.origin(name)
        if origin is None:
            raise LookupError(f"no class or function {where}")
        return read(":".join(origin))
    about = _docstring(module.body)
    if isinstance(node, ast.FunctionDef):
        return _told(
            where, ast.get_docstring(node) or "", about, _arguments(module, node.args, drop=0)
        )
    assert isinstance(node, ast.ClassDef)
    bases = [base for base in (_base(module, b) for b in node.bases) if base is not None]
    attributes: dict[str, object] = {}
    fields: dict[str, Parameter] = {}
    computed: set[str] = set()
    arguments: tuple[Parameter, ...] = ()
    for base in reversed(bases):
        attributes |= base.attributes
        computed |= base.computed
        fields |= {p.name: p for p in base.parameters}
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef):
            if statement.name == "__init__":
                arguments = _arguments(module, statement.args, drop=1)
            elif "property" in map(ast.unparse, statement.decorator_list):
                computed.add(statement.name)
                attributes.pop(statement.name, None)
            continue
        target, value = _assigned(statement)
        if not target:
            continue
        if _is_field(node, statement):
            if not _hidden(value):
                fields[target] = _parameter(module, statement, target, value)
        elif value is not None:
            computed.discard(target)
            attributes[target] = _literal(value)
    own = ast.get_docstring(node) or ""
    return _told(
        where, own, about, arguments or tuple(fields.values()), attributes, frozenset(computed)
    )


def _told(
    where: str,
    own: str,
    about: str,
    parameters: tuple[Parameter, ...],
    attributes: Mapping[str, object] | None = None,
    computed: frozenset[str] = frozenset(),
) -> Source:
    attributes = dict(attributes or {})
    declared = attributes.get("paper")
    found = [declared] if isinstance(declared, str) else URL.findall(own) or URL.findall(about)
    line = about.partition("\n")[0]
    return Source(where, sentence(own), line, tuple(found), parameters, attributes, computed)


def sentence(text: str) -> str:
    """The first sentence of a docstring, on one line."""
    first = " ".join(text.strip().split("\n\n")[0].split())
    found = re.match(r"(.*?[.?!])(?= [A-Z`\"]|$)", first)
    return found[1] if found else first


def _base(module: _Module, node: ast.expr) -> Source | None:
    if isinstance(node, ast.Subscript):
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    try:
        return _read(f"{module.name}:{node.id}", module, node.id)
    except LookupError:
        return None


def _arguments(module: _Module, given: ast.arguments, drop: int) -> tuple[Parameter, ...]:
    positional = [*given.posonlyargs, *given.args]
    required = [None] * (len(positional) - len(given.defaults))
    pairs = list(zip(positional, [*required, *given.defaults], strict=True))[drop:]
    pairs += zip(given.kwonlyargs, given.kw_defaults, strict=True)
    return tuple(
        Parameter(
            arg.arg,
            None if default is None else _shown(default),
            module.comment(default or arg),
            "" if arg.annotation is None else ast.unparse(arg.annotation),
        )
        for arg, default in pairs
    )


def _parameter(
    module: _Module, statement: ast.stmt, name: str, value: ast.expr | None
) -> Parameter:
    assert isinstance(statement, ast.AnnAssign)
    default = None if value is None else _shown(value)
    kind = ast.unparse(statement.annotation)
    return Parameter(name, default, module.comment(statement), kind)


def _shown(value: ast.expr) -> str:
    found = _literal(value)
    return found if isinstance(found, str) and found else ast.unparse(value)


def _is_field(owner: ast.ClassDef, statement: ast.stmt) -> bool:
    """Of a dataclass, and no ClassVar."""
    marked = any("dataclass" in ast.unparse(mark) for mark in owner.decorator_list)
    if not marked or not isinstance(statement, ast.AnnAssign):
        return False
    return "ClassVar" not in ast.unparse(statement.annotation)


def _hidden(value: ast.expr | None) -> bool:
    """`field(..., init=False)`: state, no parameter."""
    if not isinstance(value, ast.Call):
        return False
    given = {k.arg: ast.unparse(k.value) for k in value.keywords}
    return given.get("init") == "False"


def _assigned(node: ast.stmt) -> tuple[str, ast.expr | None]:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id, node.value
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id, node.value
    return "", None


def _literal(value: ast.expr) -> object:
    """Its value; None where only running it would tell."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        if value.func.id == "frozenset":
            inside = _literal(value.args[0]) if value.args else ()
            return None if inside is None else frozenset(inside)  # type: ignore[call-overload]
        return None
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError):
        return None


def _docstring(body: list[ast.stmt]) -> str:
    return ast.get_docstring(ast.Module(body, [])) or ""
