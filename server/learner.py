"""Learner: an aggregator that learns is given the run's model and its proxy data, or refused."""

import copy
from collections.abc import Callable

import numpy as np
from torch import nn

from atoll.aggregation.aggregator import Aggregator, is_learner
from atoll.client.data import Data, DataInfo, Split, from_user, holdout, size
from atoll.client.flat import FlatModel
from atoll.client.proxy import checked, held_out, proxy_data
from atoll.server.check import useless

VALIDATED = 0.1  # share of the clients' examples that their validators hold out
VALIDATED_STEPS = 5  # in a merge: each would be an exchange with all validators


def learning(
    rule: Aggregator,
    module: nn.Module,
    proxy: object,
    run: Data | None,
    seed: int,
    name: str = "",
    *,
    validators: bool = False,
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
        limit=VALIDATED_STEPS if validators else None,
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

    `model` is made where something is learned; `source` names the run's data. Validators hold a
    part of the clients' data out.
    """
    if not proxy and "validators" not in getattr(rule, "needs", ()):
        return rule, run
    if proxy:
        made = learning(rule, model(), proxy, run, seed, name)
        if isinstance(proxy, str):
            run = held_out(proxy, source, run, seed)
        return made, run
    rest, held = with_validators(run, seed)
    return learning(rule, model(), held, rest, seed, name, validators=True), rest


def with_validators(run: Data, seed: int) -> tuple[Data, Data]:
    """What the clients train on, and what they hold out, as validators, of all their examples.

    The mean of the validators' gradients, weighted by examples, is that over all they hold out.
    """
    labels = run.labels() if run.info.kind == "classification" else None
    rest, held = holdout(size(run.train), seed, VALIDATED, labels)
    columns = {name: list(np.asarray(values)[rest]) for name, values in run.columns.items()}
    return Data(run.info, run.shard(rest), run.test, columns), Data(run.info, run.shard(held))


def _of_user(found: object, run: Data | None, seed: int) -> Data:
    """All of a Dataset or Split, or the training part of a Data or a pair."""
    if isinstance(found, Split):
        info = run.info if run else DataInfo(tuple(found.raw.shape[1:]), int(found.y.max()) + 1)
        return checked(Data(info, found), run)
    data = from_user(found if isinstance(found, Data | tuple) else (found, found), "proxy", seed)
    info = run.info if run else data.info  # who infers classes may have seen fewer
    return checked(Data(info, data.train), run)
