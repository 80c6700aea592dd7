"""Compose: which parts go together. Judged by what each declares, not by its name.

A mix is a strategy, an aggregator, an outer optimizer, a local algorithm, a codec for either way,
and the run itself, whose options give things too. Three rules hold for all of them:

    what a part needs, another gives
    what a part refuses, no other gives
    a strategy can bring as many updates to a version as the aggregator needs

The words stand in `atoll.protocols.facts`. What is lost without being wrong is a warning.
"""

from collections.abc import Callable, Iterable, Sequence

from atoll.protocols.errors import UsageError
from atoll.protocols.facts import TOKENS, Facts

OF_THE_RUN = {  # what a run gives that was asked for, and how to ask
    "proxy_data": "give --proxy DATA, or aggregator parameters that do without",
    "validators": "their gradients on what they hold out carry no noise: leave --local-dp out, "
    "give --proxy DATA, or take no_proxy=coherence",
    "plain_sgd": "take --local-optimizer sgd, and leave out --local-momentum",
}
Offers = Callable[[], Iterable[Facts]]  # the parts there are, built in and installed


def check(parts: Sequence[Facts], offers: Offers = tuple) -> list[str]:
    """Warnings. UsageError FL-S104 for a mix that cannot be, naming both sides and the remedy.

    `offers` are asked only then, for what could stand in its place.
    """
    for part in parts:
        _needs(part, parts, offers)
    for part in parts:
        _refuses(part, parts, offers)
    return _sizes(parts)


def _needs(part: Facts, parts: Sequence[Facts], offers: Offers) -> None:
    there = {token for other in parts if other is not part for token in other.gives}
    for token in sorted(part.needs - there):
        other = _lacking(token, part, parts, offers)
        raise UsageError(
            "FL-S104",
            f"{part} needs {meaning(token)}, which {other} does not give",
            _how_to_get(token, part, offers),
        )


def _refuses(part: Facts, parts: Sequence[Facts], offers: Offers) -> None:
    for other in parts:
        for token in sorted(part.refuses & other.gives) if other is not part else ():
            instead = _names(f for f in offers() if f.slot == other.slot and token not in f.gives)
            raise UsageError(
                "FL-S104",
                f"{part} cannot work with {meaning(token)}, which {other} makes",
                f"take another {other.slot}{instead}, or another {part.slot}",
            )


def _sizes(parts: Sequence[Facts]) -> list[str]:
    strategy = next((p for p in parts if p.slot == "strategy"), None)
    rule = next((p for p in parts if p.slot == "aggregator"), None)
    if strategy is None or rule is None or rule.min_results is None:
        return []
    fewest, most = strategy.merges
    if most is not None and most < rule.min_results:
        raise UsageError(
            "FL-S104",
            f"{rule} needs {rule.min_results} updates for a version, "
            f"{strategy} never brings more than {most}",
            "let the strategy merge more at once, or give the aggregator parameters that need "
            "fewer",
        )
    if fewest < rule.min_results:
        return [
            f"{rule} needs {rule.min_results} updates for a version; {strategy} may bring fewer, "
            "and those are merged by their mean"
        ]
    return []


def meaning(token: str) -> str:
    """In words, also where it is nobody's but the user's."""
    return TOKENS.get(token, token.replace("_", " "))


def _lacking(token: str, part: Facts, parts: Sequence[Facts], offers: Offers) -> str:
    """Who of the mix could have given it: the part of a slot that has such, else the run."""
    slots = {facts.slot for facts in offers() if token in facts.gives}
    able = [p for p in parts if p.slot in slots and p is not part]
    return " and ".join(map(str, able)) or "this run"


def _how_to_get(token: str, part: Facts, offers: Offers) -> str:
    if token in OF_THE_RUN:
        return OF_THE_RUN[token]
    found = [f for f in offers() if token in f.gives and f.slot != part.slot]
    if found:
        slot = found[0].slot
        return f"take {slot}{_names(f for f in found if f.slot == slot)}"
    return f"take another {part.slot}"


def _names(found: Iterable[Facts]) -> str:
    names = sorted({facts.name for facts in found})
    return (
        " " + (", ".join(names[:-1]) + " or " if len(names) > 1 else "") + names[-1]
        if names
        else ""
    )
