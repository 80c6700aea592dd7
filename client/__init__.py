"""Trains, and obeys orders: the training half for everyone, and the half that connects."""

from typing import TYPE_CHECKING

from atoll.protocols.lazy import exports

if TYPE_CHECKING:
    from atoll.client.algorithm import LocalAlgorithm as LocalAlgorithm
    from atoll.client.client import Client as Client
    from atoll.client.data import Data as Data
    from atoll.client.local import LocalConfig as LocalConfig
    from atoll.client.local import TorchTrainer as TorchTrainer
    from atoll.client.specs import make_trainer as make_trainer
    from atoll.client.trainer import Task as Task
    from atoll.client.trainer import Trained as Trained
    from atoll.client.trainer import Trainer as Trainer

__getattr__ = exports(
    __name__,
    {
        "Client": "client",
        "Data": "data",
        "LocalAlgorithm": "algorithm",
        "LocalConfig": "local",
        "Task": "trainer",
        "TorchTrainer": "local",
        "Trained": "trainer",
        "Trainer": "trainer",
        "make_trainer": "specs",
    },
)
