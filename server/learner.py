"""Learner: an aggregator that learns is given the run's model and its proxy data, or refused."""

import copy
from collections.abc import Callable

from torch import nn

from atoll.aggregation.aggregator import Aggregator, AskingRule, is_asking, is_learner
from atoll.aggregation.asking import Asker, Asking
from atoll.client.data import Data, DataInfo, Split, from_user
from atoll.client.flat import FlatModel
from atoll.client.proxy import checked, held_out, proxy_data
from atoll.server.check import useless


def learning(
    rule: Aggregator,
    module: nn.Module,
    proxy: object,
    run: Data | None,
    seed: int,
    name: str = "",
) -> Aggregator:
    """`rule` with what it learns by: `proxy`, a spec or examples, apart from the `run`'s test set.

    UsageError FL-S104 where it learns nothing, DataError for the data.
    """
    if proxy is None or proxy == "":
        return rule
    if not is_learner(rule) or not rule.learns:
        raise useless(name)
    data = proxy_data(proxy, run, seed) if isinstance(proxy, str) else _of_user(proxy, run, seed)
    flat = FlatModel(
        copy.deepcopy(module), data.train, data.info.kind,
        batch_statistics=rule.buffers == "recompute",
    )  # fmt: skip
    return rule.with_proxy(flat)


def learning_in(
    rule: Aggregator,
    model: Callable[[], nn.Module],
    run: Data,
    source: str,
    proxy: str | Data,
    seed: int,
    name: str,
) -> tuple[Aggregator, Data]:
    """As `learning`, in a simulation, and the data that is left for its clients.

    `model` is made where something is learned; `source` names the run's data.
    """
    if not proxy:
        return rule, run
    made = learning(rule, model(), proxy, run, seed, name)
    return made, held_out(proxy, source, run, seed) if isinstance(proxy, str) else run


def validated(rule: Aggregator) -> AskingRule | None:
    """`rule`, if it is to ask validators: it lacks only whom."""
    return rule if is_asking(rule) and rule.proxy is None else None


def asking(rule: AskingRule, count: int, asker: Asker) -> Aggregator:
    """`rule` that asks, in merges of `count` elements."""
    return rule.with_proxy(Asking(count, asker))


def _of_user(found: object, run: Data | None, seed: int) -> Data:
    """All of a Dataset or Split, or the training part of a Data or a pair."""
    if isinstance(found, Split):
        info = run.info if run else DataInfo(tuple(found.raw.shape[1:]), int(found.y.max()) + 1)
        return checked(Data(info, found), run)
    data = from_user(found if isinstance(found, Data | tuple) else (found, found), "proxy", seed)
    info = run.info if run else data.info  # who infers classes may have seen fewer
    return checked(Data(info, data.train), run)
