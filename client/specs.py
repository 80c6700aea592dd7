"""A trainer from specs: model, data, partition and algorithm as a user writes them."""

from dataclasses import replace

from atoll.client.algorithm import local_algorithm
from atoll.client.data import Data, Examples, load_data
from atoll.client.heldout import cut
from atoll.client.local import LocalConfig, TorchTrainer
from atoll.client.models import build
from atoll.client.partition import shard_of

DEFAULT = LocalConfig()


def make_trainer(
    model: str,
    data: str | Data,
    partition: str = "iid",
    shard: tuple[int, int] = (0, 1),
    seed: int = 0,
    local: LocalConfig = DEFAULT,
    algorithm: str = "plain",
    client: str = "client",
    slowdown: float = 0.0,
    validate: float = 0.0,
) -> TorchTrainer:
    """A trainer from specs, for client `shard[0]` (from 0) of `shard[1]` clients, which holds the
    share `validate` of its examples out to judge models by."""
    loaded = load_data(data) if isinstance(data, str) else data
    rows, held = cut(shard_of(loaded, partition, shard, seed), validate, seed, client)
    mine, apart = loaded.shard(rows), loaded.shard(held) if validate else None
    return trainer_on(mine, loaded, model, seed, local, algorithm, client, slowdown, apart)


def trainer_on(
    mine: Examples,
    data: Data,
    model: str,
    seed: int = 0,
    local: LocalConfig = DEFAULT,
    algorithm: str = "plain",
    client: str = "client",
    slowdown: float = 0.0,
    held: Examples | None = None,
) -> TorchTrainer:
    """A trainer from specs, for a client that trains on `mine` of `data`, and judges on `held`."""
    if algorithm == "plain" and local.prox:
        algorithm, local = f"fedprox:mu={local.prox}", replace(local, prox=0.0)
    return TorchTrainer(
        build(model, data.info, seed),
        mine,
        data.test,
        local,
        kind=data.info.kind,
        algorithm=local_algorithm(algorithm),
        client=client,
        seed=seed,
        slowdown=slowdown,
        held=held,
    )
