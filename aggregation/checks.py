"""Checks of a slot's parameters: each raises UsageError FL-S102 with the value and the remedy."""

import math

from atoll.protocols.errors import UsageError


def at_least(least: float, **values: float | None) -> None:
    """Every value given is a number not below `least`; None means "not set" and passes."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise UsageError("FL-S102", f"{name}={value}", f"choose at least {least}")


def positive(**values: float | None) -> None:
    """Every value given is a number above 0; None means "not set" and passes."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise UsageError("FL-S102", f"{name}={value}", "choose more than 0")


def at_most(most: float, **values: float | None) -> None:
    """Every value given is a number not above `most`; None means "not set" and passes."""
    for name, value in values.items():
        if value is not None and not value <= most:
            raise UsageError("FL-S102", f"{name}={value}", f"choose at most {most}")


def within(least: float, most: float, **values: float | None) -> None:
    """Every value given is a number from `least` to `most`; None means "not set" and passes."""
    for name, value in values.items():
        if value is not None and not least <= value <= most:
            raise UsageError("FL-S102", f"{name}={value}", f"choose from {least:g} to {most:g}")


def share(**values: float) -> None:
    """Every value is from 0 on, and below 1: how much of something stays, which is never all."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise UsageError("FL-S102", f"{name}={value}", "choose at least 0, and less than 1")


def finite(**values: float | None) -> None:
    """No value given is without end; None means "not set" and passes."""
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise UsageError("FL-S102", f"{name}={value}", "choose a number, or leave it out")


def one_of(known: tuple[str, ...], **values: str) -> None:
    """Every value is one of the words in `known`."""
    for name, value in values.items():
        if value not in known:
            raise UsageError("FL-S102", f"{name}={value!r}", f"choose {' or '.join(known)}")
