"""Models: shapes that fit the data, manifests, and a user's module in each of its forms."""

import math
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from atoll.client.data import DataInfo
from atoll.client.models import BUILTIN, build, manifest_of, seed_torch
from atoll.protocols.errors import UsageError
from atoll.protocols.manifest import TensorSpec

DIGITS = DataInfo((1, 8, 8), 10)
MNIST = DataInfo((1, 28, 28), 10)
CIFAR = DataInfo((3, 32, 32), 10)
TEXT = DataInfo((16,), 7, "text", "abcdefg")


def trainable(module: nn.Module) -> int:
    return manifest_of(module).counts["trainable"]


@pytest.mark.parametrize("info", [DIGITS, MNIST, CIFAR])
@pytest.mark.parametrize("spec", ["linear", "mlp", "mlp:hidden=8,depth=3", "cnn"])
def test_pictures_go_in_and_a_score_for_each_class_comes_out(spec: str, info: DataInfo) -> None:
    assert build(spec, info, 0)(torch.randn(2, *info.shape)).shape == (2, info.classes)


@pytest.mark.parametrize("spec", ["mlp", "cnn", "charlm", f"{__name__}:Shaped"])
def test_a_model_that_wants_the_datas_shape_cannot_do_without(spec: str) -> None:
    with pytest.raises(UsageError, match="takes its shape from the data") as refused:
        build(spec, None, 0)
    assert refused.value.code == "FL-S104"


class Shaped(nn.Linear):
    def __init__(self, info: DataInfo) -> None:
        super().__init__(info.classes, 1)


def test_a_model_of_ones_own_may_have_a_shape_of_its_own() -> None:
    assert trainable(build("torch.nn:Linear:in_features=3,out_features=1", None, 0)) == 4


def test_the_harness_models_have_their_known_sizes() -> None:
    assert trainable(build("mlp", MNIST, 0)) == 784 * 64 + 64 + 64 * 10 + 10 == 50_890
    assert trainable(build("cnn", MNIST, 0)) == 54_314
    assert trainable(build("linear", DIGITS, 0)) == 650
    assert trainable(build("resnet18", CIFAR, 0)) == 11_173_962


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_resnet_takes_either_norm_and_only_batch_has_statistics(norm: str) -> None:
    model = build(f"resnet18:width=8,norm={norm}", CIFAR, 0)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    counts = manifest_of(model).counts
    assert (counts["buffers_float"] > 0, counts["buffers_other"] > 0) == (norm == "batch",) * 2


def test_charlm_does_not_look_ahead() -> None:
    model = build("charlm:width=32,depth=2", TEXT, 0).eval()
    a = torch.arange(16)[None] % 7
    b = a.clone()
    b[0, 10:] = 3
    seen, other = model(a), model(b)
    assert seen.shape == (1, 16, 7)
    assert torch.equal(seen[:, :10], other[:, :10])
    assert not torch.allclose(seen[:, 10:], other[:, 10:])


def test_charlm_starts_near_the_loss_of_a_guess() -> None:
    out = build("charlm", TEXT, 0)(torch.arange(16)[None] % 7)
    loss = nn.functional.cross_entropy(out[0], torch.arange(16) % 7)
    assert abs(float(loss.detach()) - math.log(7)) < 0.3


@pytest.mark.parametrize(
    ("spec", "info", "code"),
    [
        ("mpl", DIGITS, "FL-S101"),
        ("mlp:width=3", DIGITS, "FL-S102"),
        ("cnn", TEXT, "FL-S104"),
        ("charlm", DIGITS, "FL-S104"),
        ("mlp:hidden=0", DIGITS, "FL-S102"),
        ("mlp:depth=-1", DIGITS, "FL-S102"),
        ("charlm:width=33", TEXT, "FL-S102"),
        ("charlm:width=0", TEXT, "FL-S102"),
        ("charlm:depth=-1", TEXT, "FL-S102"),
        ("charlm:context=8", TEXT, "FL-S102"),
        ("resnet18:norm=layer", CIFAR, "FL-S102"),
        ("no_such_module:Net", DIGITS, "FL-S103"),
        ("math:pi", DIGITS, "FL-S103"),
        ("builtins:dict", DIGITS, "FL-S103"),
    ],
)
def test_a_spec_that_cannot_be_a_model_is_refused(spec: str, info: DataInfo, code: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(spec, info, 0)
    assert caught.value.code == code


@pytest.mark.parametrize("spec", sorted(BUILTIN))
def test_the_seed_makes_the_model_and_the_caller_s_randomness_stays(spec: str) -> None:
    info = TEXT if spec == "charlm" else CIFAR
    spec = f"{spec}:width=8" if spec == "resnet18" else spec
    before = torch.random.get_rng_state()
    a, b, c = (build(spec, info, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


# ---- a user's own --------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(3, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


@pytest.fixture
def mine() -> Iterator[ModuleType]:
    module = ModuleType("mine")
    sys.modules["mine"] = module
    yield module
    del sys.modules["mine"]


def test_a_class_a_function_and_a_module_are_all_models(mine: ModuleType) -> None:
    def shaped(info: DataInfo, hidden: int = 2) -> nn.Module:
        return nn.Linear(info.shape[0], hidden)

    mine.Net, mine.shaped, mine.made = Net, shaped, Net(5)  # type: ignore[attr-defined]
    info = DataInfo((9,), 2)
    assert trainable(build("mine:Net:hidden=6", info, 0)) == 3 * 6 + 6
    assert trainable(build("mine:shaped:hidden=3", info, 0)) == 9 * 3 + 3
    copy = build("mine:made", info, 0)
    assert trainable(copy) == 20
    assert copy is not mine.made, "clients in one process must not share weights"
    with pytest.raises(UsageError):
        build("mine:made:hidden=3", info, 0)


# ---- manifests -----------------------------------------------------------------------------


def test_groups_are_trainable_frozen_and_buffers_in_state_dict_order() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    assert manifest_of(model).tensors == (
        TensorSpec("0.weight", (3, 2), "float32", "trainable"),
        TensorSpec("0.bias", (3,), "float32", "frozen"),
        TensorSpec("1.weight", (3,), "float32", "trainable"),
        TensorSpec("1.bias", (3,), "float32", "trainable"),
        TensorSpec("1.running_mean", (3,), "float32", "buffers_float"),
        TensorSpec("1.running_var", (3,), "float32", "buffers_float"),
        TensorSpec("1.num_batches_tracked", (), "int64", "buffers_other"),
    )


def test_tied_weights_stand_once_and_half_precision_keeps_its_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert [t.name for t in manifest_of(model).tensors] == ["0.weight"]
    assert manifest_of(model.to(torch.bfloat16)).tensors[0].dtype == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.complex64])
def test_a_tensor_that_cannot_travel_is_refused(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.register_buffer("phase", torch.zeros(2, dtype=dtype))
    with pytest.raises(UsageError, match="phase"):
        manifest_of(model)


def test_a_lazy_tensor_is_refused_before_it_has_a_shape() -> None:
    with pytest.raises(UsageError, match=r"weight.*lazy"):
        manifest_of(nn.LazyLinear(3))


def test_a_seed_is_torchs_own() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        wanted = torch.rand(3)
        seed_torch(5)
        assert torch.equal(torch.rand(3), wanted)
