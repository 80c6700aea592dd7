"""Bounds: what may stand in a field of a message, how much of it, and text that people may see.

Whatever is out of bounds is RemoteError FL-W101 with the value.
"""

import math
import re
import unicodedata
from collections.abc import Iterable

from atoll.protocols.errors import RemoteError
from atoll.protocols.events import MAX_COUNT
from atoll.protocols.ids import CLIENT_NAME

CLIENT = CLIENT_NAME
ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
ORDER = re.compile(r"o[0-9]{1,18}")
UPDATE = re.compile(r"o[0-9]{1,18}\.[0-9]{1,10}(\.s[0-9]{1,10})?")
QUESTION = re.compile(r"q[0-9]{1,18}")
METRIC = re.compile(r"[a-zA-Z0-9_./-]{1,64}")
CAPABILITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,63}")
SCHEMA = re.compile(r"([0-9a-f]{64})?")
GROUP = re.compile(r"[a-z_]{1,32}(:[A-Za-z0-9_.\-/]{1,64})?")
KIND = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
CODEC = re.compile(r"[A-Za-z0-9_.:,=+-]{1,64}")
LINK = re.compile(r"[A-Za-z0-9_.:=,+-]{0,128}")
BASE = re.compile(r"([A-Za-z0-9_.:,=+-]{1,64}/[0-9]{1,16}(@[0-9]{1,16})?)?")

SHARES = ("accuracy",)  # metrics from 0 to 1
MAX_METRICS = 256
MAX_SECTIONS = 64
MAX_LIST = 64
MAX_DIFFERENCES = 64  # of a model, in one order
MAX_EXTRAS = 4  # blobs of one order
MAX_TEXT = 1000  # characters of a message for people


def text(value: str, limit: int = MAX_TEXT) -> str:
    """`value` for people's eyes: cut to `limit`, control and direction characters replaced."""
    if not value:
        return ""
    cut = value if len(value) <= limit else value[: limit - 1] + "…"
    if cut.isascii() and cut.isprintable():
        return cut
    return "".join(
        " " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in cut
    )


def name(what: str, value: str, pattern: re.Pattern[str]) -> str:
    if not pattern.fullmatch(value):
        raise malformed(f"{what} {text(value, 80)!r}")
    return value


def names(what: str, values: Iterable[str], pattern: re.Pattern[str]) -> tuple[str, ...]:
    found = tuple(values)
    if len(found) > MAX_LIST:
        raise malformed(f"{len(found)} {what}, at most {MAX_LIST} are taken")
    return tuple(name(what, value, pattern) for value in found)


def count(what: str, value: int) -> int:
    if not 0 <= value <= MAX_COUNT:
        raise malformed(f"{what}={value}")
    return value


def seconds(what: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise malformed(f"{what}={value}")
    return value


def malformed(what: str) -> RemoteError:
    return RemoteError("FL-W101", f"malformed message: {what}", "see protocols/wire.proto")
