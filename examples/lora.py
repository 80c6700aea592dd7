"""LoRA in a federation: a pretrained model stays where it is, only its adapters train and travel.

Hu et al. 2021, https://arxiv.org/abs/2106.09685, by peft (`pip install 'atoll[lora]'`). The base
here knows the digits 0 to 4 and is made in code, to need no download; in earnest it comes from a
file that server and clients load alike, since frozen parameters are never sent.

    python lora.py

or with processes:  fl-server start --model lora:Net --data digits --versions 10
"""

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from atoll.aggregation import FedAvg
from atoll.client.data import load_data
from atoll.client.local import LocalConfig, TorchTrainer
from atoll.client.trainer import Task
from atoll.server import simulate
from atoll.server.training import Training

CLIENTS = {"a": 0.1, "b": 0.1, "c": 0.2, "d": 0.2}  # seconds per step
LOCAL = LocalConfig(lr=0.1, momentum=0.9, clip=1.0)


def base() -> nn.Module:
    """Pretrained on half of the digits."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(*layers, nn.ReLU(), nn.Linear(256, 10))
    digits = load_data("digits")
    known = digits.shard((digits.labels() < 5).nonzero()[0])
    TorchTrainer(net, known, config=LOCAL).train(Task(steps=100))
    return net


def Net(rank: int = 4) -> nn.Module:  # noqa: N802  named as a model is
    """The base with adapters; peft freezes all the rest."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["1", "3", "5"])
    return inject_adapter_in_model(config, base())


def train(rounds: int = 12) -> tuple[list[float], Training]:
    """Accuracy of each version on all digits, the base's first, and what it came from."""
    learning = Training.of(list(CLIENTS), model="lora:Net", data="digits", local=LOCAL)
    first = learning.evaluate(0)["accuracy"]
    made = simulate(FedAvg(steps=20, rounds=rounds, min_clients=4), CLIENTS, learning=learning)
    return [first, *(value for _, value in made.accuracy)], learning


if __name__ == "__main__":
    accuracy, learning = train()
    update, _ = learning.sizes()
    whole = 4 * sum(p.numel() for p in base().parameters())
    print(f"the base knows half of the digits:   accuracy {accuracy[0]:.3f}")
    print(f"with adapters, {len(accuracy) - 1} versions later:   accuracy {accuracy[-1]:.3f}")
    print(f"an update has {update:,} bytes, the whole model {whole:,}: {whole / update:.1f} times")
