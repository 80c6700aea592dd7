"""Export names without importing what they need: `--help` must not pay for torch (PEP 562)."""

import importlib
from collections.abc import Callable, Mapping


def exports(package: str, where: Mapping[str, str]) -> Callable[[str], object]:
    """A module `__getattr__` that finds each name of `where`, {"FedAvg": "fedavg"}, when used."""

    def find(name: str) -> object:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{where[name]}"), name)

    return find
