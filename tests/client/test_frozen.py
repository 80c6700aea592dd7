"""Frozen parts: never sent, never moved; their buffers follow the declared policy."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from atoll.aggregation.fedavg import FedAvg
from atoll.client.data import load_data
from atoll.client.local import LocalConfig
from atoll.protocols.manifest import TRAVELLING
from atoll.server.buffers import Buffers
from atoll.server.simulator import simulate
from atoll.server.training import Training

DATA = load_data("synthetic:features=6,classes=3,examples=200")
PACES = {"a": 0.1, "b": 0.1}


class Frozen(nn.Module):
    """A body with BatchNorm that does not train, and a head that does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.body.requires_grad_(False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(x))
        return scores


class Still(Frozen):
    """The same; its body keeps its pretrained statistics too."""

    def train(self, mode: bool = True) -> "Still":
        super().train(mode)
        self.body.eval()
        return self


def trained(model: str, buffers: Buffers) -> tuple[Training, Mapping[str, Tensor]]:
    made = Training.of(
        list(PACES), model=f"{__name__}:{model}", data=DATA, buffers=buffers,
        local=LocalConfig(lr=0.5, batch=16),
    )  # fmt: skip
    before = {name: value.clone() for name, value in made.model().items()}
    simulate(FedAvg(steps=5, rounds=3, min_clients=2), PACES, learning=made)
    return made, before


def test_what_is_frozen_has_no_byte_in_an_update_and_no_name_in_a_version() -> None:
    made, before = trained("Frozen", "weighted_mean")
    groups = made.manifest.counts
    assert groups["frozen"] == 6 * 8 + 8 + 8 + 8  # a linear layer and BatchNorm's two
    assert groups["trainable"] == 8 * 3 + 3
    sent = 4 * groups["trainable"] + 4 * groups["buffers_float"] + 8 * groups["buffers_other"]
    assert made.sizes() == (sent, sent)
    travelling = {t.name for t in made.manifest.tensors if t.group in TRAVELLING}
    assert set(before) == travelling
    assert not any(name.startswith("body.0") for name in travelling)
    assert not torch.equal(made.model()["head.weight"], before["head.weight"])


@pytest.mark.parametrize(("buffers", "moves"), [("weighted_mean", True), ("keep_server", False)])
def test_statistics_of_frozen_parts_follow_the_declared_policy(
    buffers: Buffers, moves: bool
) -> None:
    made, before = trained("Frozen", buffers)
    same = torch.equal(made.model()["body.1.running_mean"], before["body.1.running_mean"])
    assert same is not moves


def test_a_body_in_eval_keeps_its_statistics_under_any_policy() -> None:
    made, before = trained("Still", "weighted_mean")
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(made.model()[f"body.1.{name}"], before[f"body.1.{name}"])
