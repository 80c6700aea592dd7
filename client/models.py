"""Models: the built-in ones, shaped by the data, and any of the user's own as `module:object`.

A user's object may be an nn.Module subclass, a function that makes a module, or a module. Where
its parameters have one called `info`, it is given the data's `DataInfo`.
"""

import copy
import functools
import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from atoll.aggregation.checks import at_least
from atoll.client.data import DataInfo
from atoll.protocols import slots
from atoll.protocols.errors import UsageError
from atoll.protocols.manifest import DTYPES, Group, Manifest, TensorSpec

UNMADE = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
BUILTIN = {
    "linear": "atoll.client.models:linear",
    "mlp": "atoll.client.models:mlp",
    "cnn": "atoll.client.vision:cnn",
    "resnet18": "atoll.client.vision:resnet18",
    "charlm": "atoll.client.charlm:CharLM",
}


def build(spec: str, info: DataInfo | None, seed: int) -> nn.Module:
    """The module that `spec` names, initialised by torch's defaults under `seed`.

    The caller's random state is left as it was. Raises UsageError FL-S101 to FL-S104: the last
    where it wants to know the data's `info` and there is none.
    """
    found = slots.find("model", spec, BUILTIN)
    params = dict(slots.split(spec)[2])
    if isinstance(found, nn.Module):
        if params:
            raise UsageError(
                "FL-S102", f"{spec!r} is a module and takes no parameters", "drop them"
            )
        return copy.deepcopy(found)
    if not callable(found):
        raise UsageError(
            "FL-S103", f"{spec!r} is {type(found).__name__}, not a model", "name an nn.Module"
        )
    make = _given_info(spec, found, info)
    with torch.random.fork_rng(devices=[]):
        seed_torch(seed)
        made = slots.call("model", spec, make, params)
    if not isinstance(made, nn.Module):
        raise UsageError(
            "FL-S103", f"{spec!r} made {type(made).__name__}, not a model", "return an nn.Module"
        )
    return made


def seed_torch(seed: int) -> None:
    """As `torch.manual_seed`, which where there is no accelerator writes down from where it was
    called, for when one comes: 0.7 ms forty calls deep, at each order."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def manifest_of(module: nn.Module) -> Manifest:
    """Names, shapes, dtypes and groups of `module`'s tensors, in the order of its state_dict.

    Tied weights stand once, under their first name. Raises UsageError FL-S102 for a tensor that
    cannot travel (complex, or lazy and not made yet).
    """
    return Manifest(
        tuple(
            TensorSpec(name, _shape(name, tensor), _dtype(name, tensor), _group(tensor))
            for name, tensor in named_tensors(module)
        )
    )


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and persistent buffers, each once, in the order of the state_dict."""
    seen: set[int] = set()
    named = []
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            named.append((name, tensor))
    return named


def linear(info: DataInfo) -> nn.Module:
    """Softmax regression; plain linear regression where there is one output."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(info.shape), info.classes))


def mlp(info: DataInfo, hidden: int = 64, depth: int = 1) -> nn.Module:
    """`depth` ReLU layers of `hidden`; the default on 28x28 is 784-64-10, 50,890 parameters."""
    at_least(1, hidden=hidden)
    at_least(0, depth=depth)
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(info.shape)
    for _ in range(depth):
        layers += [nn.Linear(width, hidden), nn.ReLU()]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, info.classes))


def _given_info(
    spec: str, found: Callable[..., object], info: DataInfo | None
) -> Callable[..., object]:
    if not takes(found, "info"):
        return found
    if info is None:
        raise UsageError(
            "FL-S104", f"model {spec!r} takes its shape from the data, and there is none",
            "give --data, or a model without a parameter `info`",
        )  # fmt: skip
    return functools.partial(found, info=info)


def takes(found: Callable[..., object], name: str) -> bool:
    """Whether a callable of the user's has a parameter called so."""
    try:
        return name in inspect.signature(found).parameters
    except ValueError:  # a callable without a signature, made in C
        return False


def _group(tensor: Tensor) -> Group:
    if isinstance(tensor, nn.Parameter):
        return "trainable" if tensor.requires_grad else "frozen"
    return "buffers_float" if tensor.is_floating_point() else "buffers_other"


def _shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    if isinstance(tensor, UNMADE):
        raise UsageError(
            "FL-S102", f"tensor {name!r} is lazy and has no shape yet", "run the model once in it"
        )
    return tuple(tensor.shape)


def _dtype(name: str, tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise UsageError(
            "FL-S102", f"tensor {name!r} is {dtype}", f"use one of {', '.join(DTYPES)}"
        )
    return dtype
