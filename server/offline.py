"""Offline: what a state directory tells when no server runs. Stdlib only."""

from pathlib import Path

from atoll.protocols.errors import ServerError
from atoll.server.history import History


def versions(state: Path) -> dict[int, Path]:
    """The models on disk, by version."""
    folder = state / "versions"
    found = {int(p.name): p for p in folder.glob("*") if p.name.isdecimal()}
    files = {n: p / "model.safetensors" for n, p in sorted(found.items())}
    return {n: p for n, p in files.items() if p.exists()}


def best_model(state: Path, history: History, metric: str = "accuracy") -> Path:
    """The kept version with the highest `metric`, else the newest. ServerError FL-S107."""
    kept = versions(state)
    if not kept:
        raise ServerError("FL-S107", f"no version in {state}", "give the --state of a run")
    judged = [p for p in history.series(metric) if p.version in kept]
    best = max(judged, key=lambda p: p.value, default=None)
    return kept[best.version if best else max(kept)]
