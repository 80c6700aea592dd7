"""A module over one flat vector: its loss and gradient are the module's own."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from atoll.client.data import Split
from atoll.client.flat import PIECE, FlatModel, picked, pieces
from atoll.client.models import manifest_of
from atoll.client.objective import loss_of
from atoll.protocols.tensors import flatten


def examples(n: int) -> Split:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=random)
    return Split(x, x[:, :3].argmax(dim=1))


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3)).to(dtype)


def filled(flat: FlatModel, module: nn.Module) -> FlatModel:
    tensors = dict(module.state_dict())
    flatten(manifest_of(module), tensors, "trainable", flat.vector)
    flat.begin({"buffers_float": torch.empty(0), "buffers_other": torch.empty(0).long()})
    return flat


def expected(module: nn.Module, split: Split, at: Tensor) -> tuple[float, Tensor]:
    loss = loss_of(module.eval(), (split.x[at], split.y[at]), "classification")
    torch.autograd.backward(loss)
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return loss.item(), torch.cat([g.reshape(-1) for g in grads])


def test_loss_and_gradient_are_the_modules() -> None:
    split, at = examples(10), torch.tensor([1, 4, 7])
    flat = filled(FlatModel(net(), split), net())
    loss, gradient = flat.gradient(at)
    wanted_loss, wanted = expected(net(), split, at)
    assert loss == wanted_loss
    assert torch.allclose(gradient, wanted)
    again, _ = flat.gradient(at)  # gradients do not add up from call to call, and no dropout
    assert again == loss
    assert torch.allclose(gradient, wanted)
    whole, _ = expected(net(), split, torch.arange(10))
    assert abs(flat.loss() - whole) < 1e-6


def test_the_vector_is_the_model() -> None:
    flat = filled(FlatModel(net(), examples(10)), net())
    before = flat.loss()
    flat.vector.mul_(3)
    assert flat.loss() != before
    flat.vector.fill_(float("nan"))
    assert not torch.isfinite(torch.tensor(flat.loss()))


def test_a_model_of_another_dtype_is_copied_to_and_fro() -> None:
    split, at = examples(10), torch.arange(10)
    double = Split(split.raw.double(), split.y)
    module = net(torch.float64)
    flat = FlatModel(module, Doubles(double))
    filled(flat, net())
    loss, gradient = flat.gradient(at)
    wanted_loss, wanted = expected(net(), split, at)
    assert abs(loss - wanted_loss) < 1e-6
    assert torch.allclose(gradient, wanted, atol=1e-6)
    flat.vector.mul_(2)
    assert flat.loss() != loss


class Doubles(Dataset[object]):
    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, at: int) -> object:
        return self.split.raw[at], self.split.y[at]


def test_the_loss_of_many_is_their_mean_whatever_the_pieces() -> None:
    n = PIECE + 1
    assert [len(p) for p in pieces(n)] == [129, 128]  # not 256 and 1: one has no statistics
    split = examples(n)
    flat = filled(FlatModel(net(), split), net())
    whole, _ = expected(net(), split, torch.arange(n))
    assert abs(flat.loss() - whole) < 1e-6


def test_examples_are_picked_from_any_batch() -> None:
    batch = {"x": torch.arange(4), "more": [torch.arange(8).view(4, 2), torch.tensor(5), "name"]}
    found = picked(batch, torch.tensor([3, 1]), 4)
    assert found["x"].tolist() == [3, 1]
    assert found["more"][0].tolist() == [[6, 7], [2, 3]]
    assert found["more"][1] == 5
    assert found["more"][2] == "name"
