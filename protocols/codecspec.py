"""Codec specs: `int8:block=64`, `topk:0.01+ef`, `up=topk:0.01+ef,down=int8`, read and checked.

A chain is one codec that packs, and what stands around it: `+ef` keeps what was lost and sends it
next time (`feedback.py`), `+zstd` presses the packed bytes (`codec_zstd.py`). One chain for both
ways, or one for each, `fp32` where a way is not named; `topk:0.01+ef/int8` allows two, the best
first. Reading needs no torch; `codecs.codec` makes the codec of a chain.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

from atoll.protocols import slots
from atoll.protocols.errors import RemoteError, UsageError
from atoll.protocols.slots import Value, to_value

# What is built in, as "module:object"; third parties add theirs as entry points `atoll.codecs`.
BUILTIN: Mapping[str, str] = {
    "fp32": "atoll.protocols.codecs:Fp32",
    "fp16": "atoll.protocols.codecs:Fp16",
    "bf16": "atoll.protocols.codecs:Bf16",
    "int8": "atoll.protocols.codec_int8:Int8",
    "int4": "atoll.protocols.codec_int4:Int4",
    "e3m0": "atoll.protocols.codec_e3m0:E3M0",
    "ternary": "atoll.protocols.codec_ternary:Ternary",
    "sign": "atoll.protocols.codec_sign:Sign",
    "topk": "atoll.protocols.codec_topk:TopK",
    "randomk": "atoll.protocols.codec_randomk:RandomK",
    "powersgd": "atoll.protocols.codec_powersgd:PowerSGD",
}
AROUND = ("ef", "zstd")  # what may stand around a codec, in the order in which it is written
OFFERED: tuple[str, ...] = (*sorted(BUILTIN), *AROUND)  # what a client says in its hello
MAX_TEXT = 200  # characters of a spec
LEVEL = 3  # zstd's own default
EXAMPLE = "write e.g. int8, topk:0.01+ef, or up=topk:0.01+ef,down=int8"
WAY = re.compile(r"\s*\b(up|down)\s*=")
STAGE = re.compile(r"\+(?=[A-Za-z_])")  # not the + of 1e+5
NAME = re.compile(r"[A-Za-z_][\w.-]*")
OBJECT = re.compile(r"[A-Za-z_][\w.]*")


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """How much of what was not sent is kept: e <- decay * e + delta - sent.

    `reset`: the residual is forgotten where it is longer than `reset` times the delta, since by
    then it points to where the model no longer is; 0: never.
    """

    decay: float = 1.0
    reset: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise UsageError("FL-S102", f"ef decay={self.decay}", "give a decay in (0, 1]")
        if not (self.reset == 0 or 1 <= self.reset < math.inf):
            raise UsageError("FL-S102", f"ef reset={self.reset}", "give 0 (never), or 1 and more")

    @property
    def text(self) -> str:
        given = [f"decay={_short(self.decay)}"] if self.decay != 1 else []
        given += [f"reset={_short(self.reset)}"] if self.reset else []
        return "ef" + (":" + ",".join(given) if given else "")


@dataclass(frozen=True, slots=True)
class Chain:
    """One way of the wire: the codec that packs, and what stands around it."""

    name: str  # of the codec: "topk", or "module:object"
    args: tuple[Value, ...] = ()  # without a name: `topk:0.01` gives (0.01,)
    params: tuple[tuple[str, Value], ...] = ()
    feedback: ErrorFeedback | None = None
    zstd: int | None = None  # level; None: not pressed

    @property
    def text(self) -> str:
        """As one writes it; `parse` gives the same chain back."""
        given = [*map(_short, self.args), *(f"{k}={_short(v)}" for k, v in self.params)]
        stages = [self.name + (":" + ",".join(given) if given else "")]
        stages += [self.feedback.text] if self.feedback else []
        if self.zstd is not None:
            stages.append("zstd" + (f":{self.zstd}" if self.zstd != LEVEL else ""))
        return "+".join(stages)

    @property
    def needs(self) -> tuple[str, ...]:
        """What a client must offer to take part: ("topk", "ef", "zstd")."""
        return (self.name, *(["ef"] if self.feedback else []), *(["zstd"] if self.presses else []))

    @property
    def presses(self) -> bool:
        return self.zstd is not None

    @property
    def own(self) -> bool:
        """Whether it is somebody's `module:object`, to be imported."""
        return ":" in self.name

    @property
    def exact(self) -> bool:
        """Whether values come back as they were."""
        return self.name == "fp32"


@dataclass(frozen=True, slots=True)
class Ways:
    """What a run allows each way, the best first; empty where a client asks for nothing."""

    up: tuple[Chain, ...]
    down: tuple[Chain, ...]

    @property
    def texts(self) -> tuple[str, str]:
        """(up, down) as they stand in a run's spec, "topk:0.01+ef/int8"."""
        return "/".join(c.text for c in self.up), "/".join(c.text for c in self.down)


def parse_ways(text: str, default: str = "fp32") -> Ways:
    """`int8` for both ways, or `up=...,down=...`, `default` where a way is not named.

    Each way may give several, `topk:0.01+ef/int8`. Raises UsageError FL-S102, FL-S108. `+ef` is the
    up-link's: where one text stands for both ways the down-link has none, since the chain of a
    lossy down-link carries on what it left out by itself.
    """
    if not WAY.search(text):
        both = _each(text)
        return Ways(both, tuple(replace(one, feedback=None) for one in both))
    found: dict[str, str] = {}
    way = ""
    for part in text.split(","):
        if match := WAY.match(part):
            way = match[1]
            if way in found:
                _wrong(text, f"{way}= stands twice")
            found[way] = part[match.end() :]
        elif not way:
            _wrong(text, f"{part!r} stands before up= and down=")
        else:
            found[way] += "," + part
    up, down = _each(found.get("up", default)), _each(found.get("down", default))
    for one in down:
        if one.feedback is not None:
            raise UsageError(
                "FL-S102",
                f"codec {text!r}: error feedback on the way down",
                f"write down={replace(one, feedback=None).text}: what a download leaves out goes "
                "with the next one anyway",
            )
    return Ways(up, down)


def _each(text: str) -> tuple[Chain, ...]:
    return tuple(parse(one) for one in text.split("/")) if text else ()


def parse(text: str) -> Chain:
    """One chain. Raises UsageError FL-S102 (parameters), FL-S108 (not a spec).

    Names are not looked up here but in `known` and `codecs.codec`.
    """
    if len(text) > MAX_TEXT:
        _wrong(text[:40] + "...", f"{len(text)} characters, at most {MAX_TEXT} are read")
    first, *around = STAGE.split(text.strip())
    name, args, params = _stage(text, first)
    if name in AROUND:
        _wrong(text, f"{name} stands around a codec and is none", f"write int8+{name}")
    chain = Chain(name, args, params)
    for stage in around:
        chain = _with(text, chain, *_stage(text, stage))
    return chain


def known(chain: Chain) -> Chain:
    """`chain`, if its codec is built in, installed or somebody's own; nothing is imported.

    Raises UsageError FL-S101 (no such name, with the nearest) or FL-S110 (offered twice).
    """
    slots.locate("codec", chain.name, BUILTIN)
    return chain


def from_remote(text: str) -> Chain:
    """A chain that the other side named: what is built in or installed here, nothing else.

    Raises RemoteError FL-W108.
    """
    try:
        chain = known(parse(text))
        if not chain.own:
            return chain
        reason = "an object of the other side's is not imported"
    except UsageError as error:
        reason = error.message
    raise RemoteError(
        "FL-W108",
        f"the run packs with {text[:40]!r}, which is not taken: {reason}",
        f"known here: {', '.join(OFFERED)}; install a newer atoll, or name the codec on both sides",
    )


def _with(
    text: str,
    chain: Chain,
    name: str,
    args: tuple[Value, ...],
    params: tuple[tuple[str, Value], ...],
) -> Chain:
    """`chain` with one more stage around it."""
    if name == "ef":
        if chain.feedback is not None:
            _wrong(text, "ef stands twice")
        if chain.exact:
            _wrong(text, "fp32 loses nothing that could be sent later", "write fp32")
        return replace(chain, feedback=_feedback(text, args, dict(params)))
    if name == "zstd":
        if chain.presses:
            _wrong(text, "zstd stands twice")
        if chain.exact:
            _wrong(
                text, "zstd presses what was quantised, floats it cannot", "write e.g. int8+zstd"
            )
        given = [*args, *(v for k, v in params if k == "level")]
        level = given[0] if given else LEVEL
        wrong = len(given) != len(args) + len(params) or len(given) > 1
        if wrong or type(level) is not int or not 1 <= level <= 19:
            raise UsageError("FL-S102", f"codec {text!r}: zstd takes a level", "give 1 to 19")
        return replace(chain, zstd=level)
    return _wrong(text, f"+{name} is unknown", "what may follow a codec is +ef and +zstd")


def _feedback(text: str, args: tuple[Value, ...], params: dict[str, Value]) -> ErrorFeedback:
    for name, value in zip(("decay", "reset"), args, strict=False):
        params.setdefault(name, value)
    if len(args) > 2 or not set(params) <= {"decay", "reset"}:
        raise UsageError(
            "FL-S102", f"codec {text!r}: ef takes decay and reset", "write +ef:decay=0.95,reset=10"
        )
    numbers = {}
    for name, value in params.items():
        if isinstance(value, (bool, str)):
            raise UsageError("FL-S102", f"codec {text!r}: ef {name}={value}", "give a number")
        numbers[name] = float(value)
    return ErrorFeedback(**numbers)


def _stage(text: str, stage: str) -> tuple[str, tuple[Value, ...], tuple[tuple[str, Value], ...]]:
    name, *rest = (part.strip() for part in stage.split(":"))
    if not NAME.fullmatch(name):
        _wrong(text, f"{name!r} is no name")
    if rest and name not in (*BUILTIN, *AROUND) and OBJECT.fullmatch(rest[0]):
        name = f"{name}:{rest.pop(0)}"
    args: list[Value] = []
    params: dict[str, Value] = {}
    for item in ":".join(rest).split(",") if rest else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not key or (equals and not value) or key in params or (not equals and params):
            _wrong(text, f"{item.strip()!r} is no parameter", "write name:value,key=value")
        if equals:
            params[key.replace("-", "_")] = to_value(value)
        else:
            args.append(to_value(key))
    return name, tuple(args), tuple(params.items())


def _wrong(text: str, what: str, remedy: str = EXAMPLE) -> NoReturn:
    raise UsageError("FL-S108", f"codec {text!r}: {what}", remedy)


def _short(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and value.is_integer() else str(value)
