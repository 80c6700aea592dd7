"""Facts: what a class says of itself, so that a mix of parts can be judged before it runs.

A class of any slot, ours or yours, may declare at class level (or as a property, where it depends
on the parameters):

    needs    what another part, or the run itself, must give:  needs = frozenset({"proxy_data"})
    gives    what others may need, or refuse:                  gives = frozenset({"sparse"})
    refuses  what no other part may give:                      refuses = frozenset({"sparse"})
    paper    its URL, where the docstring's first is not it

What it does not declare is empty. An aggregator has `algebra`, `private` and `min_results` besides
(`atoll.aggregation.aggregator`), a strategy `merge_sizes`. The words are those of TOKENS; yours may
be others, they only have to meet. `atoll.aggregation.compose` is the judge.

A codec stands in two slots. What it gives on the way down is said with "down_" before it: a rule
that refuses "sparse" means updates, and does not mind a sparse "down_sparse" model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

TOKENS: Mapping[str, str] = {  # each reads well after "needs", "gives" or "refuses"
    # strategies
    "rounds": "that all updates of a version were trained from the version before it",
    "stale": "updates that were trained from older versions",
    # aggregators; the first three follow from `private` and `algebra`
    "single_updates": "to see the update of every single client",
    "weighted_sum": "a merge that is a weighted sum",
    "mixture": "a merge that adds up whole updates, each with a weight of its own",
    # codecs
    "lossy": "updates that were rounded or thinned out on their way",
    "sparse": "sparse updates, of which most values are 0",
    "sign": "updates of signs, which have all the same length",
    "low_rank": "updates of low rank",
    "error_feedback": "error feedback",
    "down_lossy": "models that were rounded or thinned out on their way",
    # the two halves of an algorithm
    "server_momentum": "a server that sends its momentum with the model",
    "control_variates": "a server that keeps control variates and sends them with the model",
    # the run
    "client_state": "clients that keep state from order to order",
    "proxy_data": "data of the server's own that is no part of its test set",
    "validators": "clients that judge a model in the middle of a merge",
    "plain_sgd": "clients that take plain SGD steps, without momentum",
    "bounded_updates": "updates of bounded length",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one part of a mix. What cannot be known yet is None, or left out of the tokens."""

    slot: str  # "strategy", "aggregator", "outer", "local algorithm", "codec", "codec down", "run"
    name: str  # as the user wrote it
    needs: frozenset[str] = frozenset()
    gives: frozenset[str] = frozenset()
    refuses: frozenset[str] = frozenset()
    min_results: int | None = None  # of an aggregator: with fewer it gives way to the mean
    merges: tuple[int, int | None] = (1, None)  # of a strategy: fewest and most updates a version

    def __str__(self) -> str:
        return f"{self.slot} {self.name}"


def told(slot: str, name: str, of: Callable[[str], object]) -> Facts:
    """Facts out of attributes: `of(name)` is a value, or None where it is not there or unknown."""
    gives = _tokens(of("gives"))
    if of("private") is False:
        gives |= {"single_updates"}
    if of("algebra") == "sum":
        gives |= {"weighted_sum", "mixture"}
    if slot == "codec down":
        gives = frozenset(f"down_{token}" for token in gives)
    least = of("min_results")
    return Facts(
        slot, name, _tokens(of("needs")), gives, _tokens(of("refuses")),
        least if slot == "aggregator" and isinstance(least, int) else None,
    )  # fmt: skip


def of_object(slot: str, name: str, part: object) -> Facts:
    """Facts of a part that is made, or of its class: then without what depends on parameters."""

    def of(attribute: str) -> object:
        found = getattr(part, attribute, None)
        return None if isinstance(found, property) else found

    return told(slot, name, of)


def _tokens(value: object) -> frozenset[str]:
    return frozenset(value) if isinstance(value, (set, frozenset, tuple, list)) else frozenset()
