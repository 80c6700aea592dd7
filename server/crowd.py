"""Crowd: the clients of a simulation, as its options describe them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from atoll.protocols.errors import UsageError
from atoll.server.world import ClientModel, attacked, parse

_UNITS: Mapping[str, float] = {
    "": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9,
    "kbit": 125.0, "mbit": 125e3, "gbit": 125e6,
}  # fmt: skip

MOST = 1_000_000  # clients: each takes a kilobyte before it does anything


def clients_of(given: Mapping[str, Any], seed: int) -> list[ClientModel]:
    """UsageError FL-S101, FL-S102 or FL-S108 for what makes no clients."""
    count, speeds, change = given["clients"], given["speeds"], given["change"]
    if count is not None and not 1 <= count <= MOST:
        raise UsageError("FL-S108", f"--clients {count}", f"give from 1 to {MOST}")
    if not 0 < given["pace"] < float("inf"):
        raise UsageError("FL-S108", f"--pace {given['pace']}", "give seconds per step, above 0")
    speeds = speeds or ("speeds:1,1,2,4" if count is None else "lognormal:0.6")
    if speeds[0].isdecimal():
        speeds = f"speeds:{speeds}"
    fixed = speeds.partition(":")[0] in ("speeds", "trace")
    if change is not None:
        if fixed:
            raise UsageError(
                "FL-S104", f"--change, but {speeds!r} has nothing to draw from",
                "give --speeds lognormal:0.6 or another distribution",
            )  # fmt: skip
        speeds += f"{',' if ':' in speeds else ':'}change={change}"
    models = parse(speeds, count or 4, given["pace"], seed)
    if fixed and count is not None and count != len(models):
        raise UsageError(
            "FL-S108", f"{speeds!r} is {len(models)} clients, --clients {count}", "drop --clients"
        )
    down, up = bandwidth_of(given["bandwidth"])
    uptime, downtime = dropout_of(given["dropout"])
    models = [replace(m, down=down, up=up, uptime=uptime, downtime=downtime) for m in models]
    return with_attackers(with_codecs(models, given), given, seed)


def with_codecs(models: list[ClientModel], given: Mapping[str, Any]) -> list[ClientModel]:
    """Some of them with codecs of their own, as --client-codec says. UsageError FL-S108."""
    asked: dict[str, str] = {}
    for text in given.get("client_codecs", ()):
        name, equals, codec = text.partition("=")
        if not equals or not codec or name in asked or name not in {m.name for m in models}:
            raise UsageError(
                "FL-S108", f"--client-codec {text!r}",
                f"write {models[0].name}=up=int8, once for each client; "
                f"there are {', '.join(m.name for m in models[:3])}, ...",
            )  # fmt: skip
        asked[name] = codec
    if asked and given["null"]:
        raise UsageError("FL-S104", "--client-codec, but --null trains nothing", "drop either")
    return [replace(m, codec=asked.get(m.name, "")) for m in models]


def with_attackers(
    models: list[ClientModel], given: Mapping[str, Any], seed: int
) -> list[ClientModel]:
    """Some of them hostile, as --attack and --attackers say."""
    attack, share = given.get("attack", ""), given.get("attackers")
    if not attack and share is None:
        return models
    if not attack or given["null"]:
        raise UsageError(
            "FL-S104", "--attackers without --attack" if not attack else "--null trains nothing",
            "add e.g. --attack sign-flip" if not attack else "drop --null or --attack",
        )  # fmt: skip
    return attacked(models, attack, 0.3 if share is None else share, seed)


def bandwidth_of(text: str) -> tuple[float, float]:
    """(down, up) in bytes a second; `20mbit` for both, or `down=100mbit,up=20mbit`."""
    if "=" not in text:
        both = size_of(text) if text else float("inf")
        return both, both
    found: dict[str, float] = {}
    for part in text.split(","):
        way, _, rate = part.partition("=")
        if way.strip() not in ("down", "up") or way.strip() in found:
            raise UsageError("FL-S108", f"--bandwidth {text!r}", "write down=100mbit,up=20mbit")
        found[way.strip()] = size_of(rate)
    return found.get("down", float("inf")), found.get("up", float("inf"))


def size_of(text: str) -> float:
    """Bytes of `100MB` or `20mbit`, powers of 1000."""
    number = text.strip().rstrip("bBkKmMgGiItT ")
    unit = text.strip()[len(number) :].strip().lower()
    try:
        value = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError("FL-S108", f"{text!r} is no size or rate", "write e.g. 20mbit or 100MB")
    return value


def dropout_of(text: str) -> tuple[float, float]:
    """(mean seconds up, mean seconds away)."""
    if not text:
        return float("inf"), 60.0
    up, _, away = text.partition(",")
    try:
        found = float(up), float(away or 60.0)
    except ValueError:
        found = 0.0, 0.0
    if not all(0 < value < float("inf") for value in found):
        raise UsageError("FL-S108", f"--dropout {text!r}", "give seconds above 0, e.g. 600,60")
    return found
