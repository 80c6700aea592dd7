"""Your own model and data in a federation: an nn.Module and a torch Dataset, nothing of ours.

    cd examples
    fl-server start --model own_model:Net --data own_model:load
    fl-client start 127.0.0.1:7447 --name a --model own_model:Net --data own_model:load

or alone, to see that it trains:  python own_model.py
"""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

Item = tuple[Tensor, int]


class Spirals(Dataset[Item]):
    """Points of two spirals, each a class: anything with `__len__` and `__getitem__` will do."""

    def __init__(self, examples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        turn = torch.rand(examples, generator=generator)  # 0: the middle, 1: the end
        self.targets = torch.arange(examples) % 2
        angle = turn * 6 + self.targets * torch.pi
        points = torch.stack([angle.cos(), angle.sin()], 1) * turn[:, None]
        self.points = points + 0.02 * torch.randn(examples, 2, generator=generator)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, at: int) -> Item:
        return self.points[at], int(self.targets[at])


def load() -> tuple[Spirals, Spirals]:
    """(train, test); each client trains on its part of `train`."""
    return Spirals(2000, seed=0), Spirals(500, seed=1)


class Net(nn.Module):
    def __init__(self, hidden: int = 64) -> None:  # own_model:Net:hidden=128 sets it
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.head = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(x).relu())
        return scores


if __name__ == "__main__":
    from atoll.client import LocalConfig, make_trainer
    from atoll.client.trainer import Task

    trainer = make_trainer("own_model:Net", "own_model:load", local=LocalConfig(momentum=0.9))
    trainer.train(Task(steps=600))
    print(trainer.evaluate())
