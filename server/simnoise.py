"""Simnoise: local differential privacy of simulated clients, each with noise of its own."""

from torch import Tensor

from atoll.aggregation.noise import KEY, derived
from atoll.client.localdp import LocalDP


class SimNoise:
    """Protects updates by `method`, and counts what it has cost each client."""

    def __init__(self, method: LocalDP, seed: int) -> None:
        self._method, self._key = method, simulated_key(seed)
        self._noisy: dict[str, int] = {}  # client -> updates with noise

    def protect(self, client: str, update: str, delta: Tensor) -> dict[str, float]:
        """In place. What the client tells of it: its epsilon after this update."""
        self._method.protect(delta, derived(self._key, "local", update))
        self._noisy[client] = self._noisy.get(client, 0) + 1
        return {"epsilon": self._method.cost(self._noisy[client])}

    def paid(self) -> dict[str, float]:
        """What the noise has cost whom it cost most; whether that one could not go on."""
        most, limit = max(self._noisy.values(), default=0), self._method.epsilon
        over = limit is not None and self._method.cost(most + 1) > limit
        return {"epsilon": self._method.cost(most), "budget_spent": float(over)}


def simulated_key(seed: int) -> bytes:
    """Noise that comes again with the seed: right for a simulation, and protects nobody."""
    return derived(bytes(KEY), "simulated", seed)
