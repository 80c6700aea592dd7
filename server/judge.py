"""Judge: the run's model with the server's test data, or the model alone."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from atoll.client.contract import Judge
from atoll.client.data import Data, from_user, load_data
from atoll.client.local import LocalConfig, TorchTrainer
from atoll.client.models import build as build_model
from atoll.client.options import own_trainer
from atoll.server.spec import RunSpec


def data_of(spec: RunSpec, slots: Mapping[str, object]) -> Data | None:
    """The run's data, of which a server uses the test set; None where it has none."""
    data = slots.get("data")
    if data is not None:
        return from_user(data, spec.data, spec.seed)
    return load_data(spec.data) if spec.data else None


def build(spec: RunSpec, slots: Mapping[str, object]) -> tuple[nn.Module, Judge | None]:
    """The model as it starts, and what evaluates it; None where the server has no test data."""
    data = data_of(spec, slots)
    module = slots.get("model")
    if module is not None and not isinstance(module, nn.Module) and callable(module):
        module = module()
    if not isinstance(module, nn.Module):
        info: Any = getattr(data, "info", None)
        module = build_model(spec.model, info, spec.seed)
    if spec.trainer:
        return module, own_trainer(spec.trainer, "server", seed=spec.seed)
    test = getattr(data, "test", None)
    if data is None or test is None:
        return module, None
    local = LocalConfig(device="cpu")
    return module, TorchTrainer(module, test, test, local, kind=data.info.kind)
