"""A server and two clients in one program, over real gRPC on loopback.

On two machines the halves are two programs: `Server(...).run(address)` here and
`Client(address, trainer).run()` there, with a model of the same shape in each.

    python python_api.py
"""

import tempfile
import threading
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from atoll.aggregation import FedCompass
from atoll.client import Client, LocalConfig, TorchTrainer
from atoll.server import Server
from atoll.server.rules import Rules
from atoll.server.server import Summary

CLIENTS = 2


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))


def rings(examples: int, seed: int) -> TensorDataset:
    """Points inside and outside a ring, each a class."""
    x = torch.randn(examples, 2, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x.norm(dim=1) > 1.2).long())


def take_part(address: str, number: int) -> None:
    """One client, with data of its own."""
    trainer = TorchTrainer(net(), rings(1000, seed=number), config=LocalConfig(momentum=0.9))
    Client(address, trainer, name=f"client{number}").run()


def train(folder: Path, target: float = 0.95) -> Summary:
    server = Server(
        net(),
        strategy=FedCompass(min_steps=10, max_steps=50, min_clients=CLIENTS),
        data=(rings(10, seed=0), rings(500, seed=CLIENTS)),  # the second part judges each version
        rules=Rules(target=target),
        folder=folder,
    )
    threads = []

    def ready(address: str) -> None:
        for number in range(CLIENTS):
            threads.append(threading.Thread(target=take_part, args=(address, number)))
            threads[-1].start()

    summary = server.run("127.0.0.1:0", ready)
    for thread in threads:
        thread.join()
    return summary


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as state:
        print(train(Path(state)))
