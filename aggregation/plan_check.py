"""Plan check: what a member looks at before it takes part in a plan that another made."""

from collections import Counter

from atoll.aggregation.allreduce import Plan
from atoll.aggregation.circle import Circle
from atoll.aggregation.shares import longest


def wrong(plan: Plan, circle: Circle) -> str:
    """Why this peer takes no part in such a plan: nobody's weight is taken at its word."""
    if circle.me not in plan.group or len(plan.group) != len(plan.weights):
        return f"{circle.me} is not in the group"
    if plan.lengths and len(plan.lengths) != len(plan.group):
        return "the lengths are not those of the group"
    if list(plan.group) != sorted({*plan.group}) or not any(plan.weights):
        return "the group is not in order, or has no work"
    ends = [0, *(part.stop for part in plan.parts)]
    if [part.start for part in plan.parts] + [circle.size] != ends:
        return "the parts are not the whole"
    if not all(part.reducer in plan.group and part.start < part.stop for part in plan.parts):
        return "a part has no reducer in the group"
    for peer in plan.group:
        if peer not in circle.roster:
            return f"{peer} is not in the roster"
    if busy := _reduces_too_much(plan, circle):
        return f"{busy} would reduce more than its bound"
    for peer, weight in zip(plan.group, plan.weights, strict=True):
        if weight not in (0.0, circle.roster[peer].weight):
            return f"the weight of {peer} is not the roster's"
    mine = plan.group.index(circle.me)
    if plan.weights[mine] and plan.lengths and plan.lengths[mine] != circle.length:
        return f"the length of {circle.me} is not what it said"
    return ""


def _reduces_too_much(plan: Plan, circle: Circle) -> str:
    """Who would, by that bandwidths are claims and what is reduced is believed; or nobody."""
    bound = longest(circle.size, [circle.roster[p].bandwidth for p in plan.group])
    held: Counter[str] = Counter()
    for part in plan.parts:
        held[part.reducer] += part.stop - part.start
    return next((peer for peer in plan.group if held[peer] > bound), "")
