"""Find what a user names for a slot: a built-in name, an entry point, or `module:object`.

A spec is `name`, `name:key=value,key=value`, `module:object` or `module:object:key=value`. Built-in
names are given as `{"fedavg": "atoll.aggregation.fedavg:FedAvg"}`; third parties add theirs as
entry points:

    [project.entry-points."atoll.strategies"]      # also .aggregators, .outers, .locals, .codecs,
    pairs = "their_package:Pairs"                  # .models, .trainers

A name that is offered twice is nobody's: it is refused when it is used.
"""

import contextlib
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping

from atoll.protocols.errors import RAISED, AtollError, UsageError
from atoll.protocols.events import MAX_COUNT

Value = bool | int | float | str
# A parameter that is a number, as Python writes one in a signature.
NUMBER = re.compile(r"\w+(: '?(int|float)( \| None)?'?( =.*)?|=-?[\d.]+(e-?\d+)?)")
WHOLE = re.compile(r"\w+: '?int( \| None)?'?( =.*)?")
TRUTH = re.compile(r"\w+(: '?bool'?( =.*)?|=(True|False))")
MEND = "mend it: -v shows where"


def split(spec: str) -> tuple[str, str, dict[str, Value]]:
    """`fedavg:steps=5` gives ("fedavg", "", {"steps": 5}), `m.n:C:lr=1` ("m.n", "C", {"lr": 1})."""
    name, *rest = spec.split(":")
    target = rest.pop(0) if rest and "=" not in rest[0] else ""
    params = parameters(":".join(rest), spec) if rest else {}
    return name.strip(), target.strip(), params


def parameters(text: str, spec: str) -> dict[str, Value]:
    """`steps=5,lr=.1` gives {"steps": 5, "lr": 0.1}. UsageError FL-S102, which names `spec`."""
    params: dict[str, Value] = {}
    for item in text.split(","):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise _no_parameter(spec, item)
        name = key.strip().replace("-", "_")
        if name in params:  # the last would hold: `clip=1,noise=1,noise=0` has no noise
            raise UsageError("FL-S102", f"{spec!r}: {name} stands twice", f"give {name} once")
        params[name] = given = to_value(value.strip())
        if isinstance(given, int) and abs(given) > MAX_COUNT:  # else told by the first client
            raise UsageError(
                "FL-S102", f"{spec!r}: {name} is more than a message takes",
                f"choose at most {MAX_COUNT}",
            )  # fmt: skip
    return params


def _no_parameter(spec: str, item: str) -> UsageError:
    return UsageError(
        "FL-S102", f"{spec!r}: {item!r} is not key=value", "write key=value,key=value"
    )


def resolve(slot: str, spec: str, builtin: Mapping[str, str]) -> object:
    """The object that `spec` names for `slot`, called with its parameters where it is callable.

    Raises UsageError FL-S101 (no such name, with the nearest), FL-S102 (parameters do not fit) or
    FL-S103 (cannot be imported).
    """
    name, _, params = split(spec)
    found = find(slot, spec, builtin)
    if not callable(found):
        if params:
            raise UsageError("FL-S102", f"{slot} {spec!r} takes no parameters", f"write {name}")
        return found
    return call(slot, spec, found, params)


def call(slot: str, spec: str, made: Callable[..., object], params: Mapping[str, object]) -> object:
    """`made(**params)`. UsageError FL-S102: a wrong parameter; FL-S103: whatever else it raises."""
    with own_code(slot, spec, "made"):
        if wrong := _wrong_kind(made, params):
            raise UsageError(
                "FL-S102", f"{slot} {spec!r}: {wrong}", f"parameters: {_parameters(made)}"
            )
        try:
            return made(**params)
        except UsageError as error:  # out of its range: the line may have five parts with a `seed`
            if error.code != "FL-S102" or repr(spec) in error.message:
                raise
            raise UsageError(error.code, f"{slot} {spec!r}: {error.message}", error.hint) from error
        except TypeError as error:
            if not params and _can_be_called(made):
                raise  # nothing that was given is wrong
            raise UsageError(
                "FL-S102",
                f"{slot} {spec!r}: {_unknown(made, params) or _no_number(made, params) or error}",
                f"parameters: {_parameters(made)}",
            ) from error


@contextlib.contextmanager
def own_code(slot: str, spec: str, when: str) -> Iterator[None]:
    """Around code of a user's own: UsageError FL-S103 for whatever it raises, `sys.exit()` too."""
    try:
        yield
    except AtollError:
        raise
    except RAISED as error:
        raise UsageError(
            "FL-S103", f"{slot} {spec!r} fails when it is {when}: {_told(error)}", MEND
        ) from error


def _can_be_called(made: Callable[..., object]) -> bool:
    """Without arguments."""
    try:
        inspect.signature(made).bind()
    except (TypeError, ValueError):
        return False
    return True


def _unknown(made: Callable[..., object], params: Mapping[str, object]) -> str:
    """Says that `made` has no such parameter; empty where that is not what is wrong."""
    known = _known(made)
    if known is None or any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return ""
    wrong = [name for name in params if name not in known]
    return f"it has no parameter {wrong[0]!r}" if wrong else ""


def _wrong_kind(made: Callable[..., object], params: Mapping[str, object]) -> str:
    """Says which parameter is no number, no whole one or no truth value where one is wanted; empty
    where none is. Few constructors look: a run fails later, or "no" is taken for true."""
    known = _known(made) or {}
    for name, value in params.items():
        wanted = str(known.get(name, ""))
        if TRUTH.fullmatch(wanted) and not isinstance(value, bool):
            return f"{name}={value!r} is neither true nor false"
        if isinstance(value, float) and WHOLE.fullmatch(wanted):
            return f"{name}={value!r} is no whole number"
        no_number = isinstance(value, bool) or (isinstance(value, float) and math.isnan(value))
        if no_number and NUMBER.fullmatch(wanted):
            return f"{name}={value!r} is no number"
    return ""


def _no_number(made: Callable[..., object], params: Mapping[str, object]) -> str:
    """Says which parameter is text where a number is wanted; empty where none is."""
    known = _known(made) or {}
    for name, value in params.items():
        if isinstance(value, str) and name in known and NUMBER.fullmatch(str(known[name])):
            return f"{name}={value!r} is no number"
    return ""


def _parameters(made: Callable[..., object]) -> str:
    """What `made` can be given, with the defaults."""
    known = _known(made)
    if known is None:
        return "see its documentation"
    bound = made.keywords if isinstance(made, functools.partial) else {}  # not the user's to give
    return (
        ", ".join(
            str(p.replace(annotation=p.empty, default=p.empty))
            + (f"={p.default}" if p.default is not p.empty else "")
            for p in known.values()
            if p.name not in bound
        )
        or "none"
    )


def _known(made: Callable[..., object]) -> Mapping[str, inspect.Parameter] | None:
    """Its parameters by name; None where it does not say, as what is written in C."""
    try:
        return inspect.signature(made).parameters
    except (TypeError, ValueError):
        return None


def find(slot: str, spec: str, builtin: Mapping[str, str]) -> object:
    """The object that `spec` names, not called. UsageError FL-S101, FL-S103 or FL-S110."""
    where, package = locate(slot, spec, builtin)
    return _load(slot, where, package)


def locate(slot: str, spec: str, builtin: Mapping[str, str]) -> tuple[str, str]:
    """(module:object, the installed package that offers it or ""); nothing is imported.

    UsageError FL-S101 (no such name, with the nearest) or FL-S110 (offered twice).
    """
    name, target, _ = split(spec)
    if target:
        see_own_folder()
        if name in builtin and importlib.util.find_spec(name) is None:
            raise _no_parameter(spec, target)  # `fedavg:steps`, and no module of that name
        return f"{name}:{target}", ""
    offered = installed(slot)
    found = offered.get(name, [])
    if len(found) + (name in builtin) > 1:
        by = ["Atoll itself"] if name in builtin else []
        raise UsageError(
            "FL-S110",
            f"{slot} {name!r} is offered by {' and by '.join([*by, *map(offerer, found)])}",
            f"uninstall one, or name yours as {found[0].module}:{found[0].attr}",
        )
    if found:
        return f"{found[0].module}:{found[0].attr}", offerer(found[0])
    if name in builtin:
        return builtin[name], ""
    known = sorted({*builtin, *offered})
    near = difflib.get_close_matches(name, known, 1)
    raise UsageError(
        "FL-S101",
        f"unknown {slot} {name!r}",
        (f"did you mean {near[0]!r}? " if near else "")
        + f"known: {', '.join(known)}; or your own as module:object",
    )


def group(slot: str) -> str:
    """The group of entry points in which packages offer theirs, e.g. "atoll.codecs"."""
    return "atoll." + {"strategy": "strategies", "local algorithm": "locals"}.get(slot, f"{slot}s")


def installed(slot: str) -> dict[str, list[importlib.metadata.EntryPoint]]:
    """What installed packages offer, by name; one that is offered twice has two."""
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in _points(tuple(sys.path), group(slot)):
        same = found.setdefault(point.name, [])
        if all(point.value != other.value for other in same):
            same.append(point)
    return dict(sorted(found.items()))


@functools.lru_cache(maxsize=32)
def _points(path: tuple[str, ...], group: str) -> importlib.metadata.EntryPoints:
    """Of a group, on `sys.path`, which is `path`: to look takes 10 ms, and a simulation asks for
    each of its clients."""
    return importlib.metadata.entry_points(group=group)


def forget_installed() -> None:
    """Look again, the next time: a package was installed, or removed, while this process runs."""
    _points.cache_clear()


def offerer(point: importlib.metadata.EntryPoint) -> str:
    """The package that an entry point came with."""
    return "an installed package" if point.dist is None else f"package {point.dist.name!r}"


def see_own_folder() -> None:
    """Let imports find a user's own module in the folder the command is typed in."""
    if "" not in sys.path:
        sys.path.insert(0, "")


def _load(slot: str, path: str, package: str) -> object:
    module, _, attribute = path.partition(":")
    of = f" of {package}" if package else ""
    mend = "mend the package, or uninstall it" if package else MEND
    see_own_folder()
    try:
        found: object = importlib.import_module(module)
    except RAISED as error:
        what = f"fails when it is imported: {_told(error)}"
        if isinstance(error, ImportError):
            what = f"cannot be imported: {error}"
            if f"{module}.".startswith(f"{error.name}.") and not package:
                mend = "check the path and PYTHONPATH"
        raise UsageError("FL-S103", f"{slot} {path!r}{of} {what}", mend) from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            near = [] if package else difflib.get_close_matches(part, dir(found), 1)
            raise UsageError(
                "FL-S103",
                f"{slot} {path!r}{of} cannot be imported: {error}",
                f"did you mean {near[0]!r}?" if near else mend,
            ) from error
    return found


def _told(error: BaseException) -> str:
    """`repr` of a SyntaxError is a page."""
    if isinstance(error, SystemExit):
        return f"it calls sys.exit({error.code!r})"
    return f"{type(error).__name__}: {error}"


def to_value(text: str) -> Value:
    """What a parameter's text means: a truth value, a number, or the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
