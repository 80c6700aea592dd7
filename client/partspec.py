"""What `--partition` can say, read without data, numpy or torch."""

from typing import NamedTuple

from atoll.protocols.errors import DataError

KNOWN = "iid, contiguous, classes:K, dirichlet:A, quantity:A, column:NAME"


class Parted(NamedTuple):
    name: str
    number: float = 0.0  # K or A
    column: str = ""


def parse(spec: str) -> Parted:
    """DataError FL-D104 for a name that is none, or a parameter that cannot be."""
    name, _, argument = spec.partition(":")
    match name:
        case "iid" | "contiguous" if not argument:
            return Parted(name)
        case "classes":
            return Parted(name, _number(spec, argument, whole=True))
        case "dirichlet" | "quantity":
            return Parted(name, _number(spec, argument))
        case "column":
            return Parted(name, column=argument)
    raise impossible(f"unknown partition {spec!r}", f"known: {KNOWN}")


def _number(spec: str, argument: str, whole: bool = False) -> float:
    try:
        value = float(argument)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf") or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise impossible(f"partition {spec!r}", f"give {kind} above 0 after the colon")
    return value


def impossible(what: str, hint: str) -> DataError:
    return DataError("FL-D104", what, hint)
