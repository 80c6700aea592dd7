"""Inner: the local optimizer's own state on disk, for who keeps it from order to order.

DiLoCo's AdamW moments are a client's own, never averaged and never reset by an outcome, so they are
written after each order as they are, and not in two phases as `keep.py` writes what must agree with
the server. Not made durable: what a power cut tears is found out, and the optimizer starts anew.
"""

import contextlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from atoll.client.local import TorchTrainer

FILE = "inner.safetensors"


def write(trainer: TorchTrainer, folder: Path, run: str = "") -> None:
    """Whole or not at all. OSError where the disk does not take it."""
    beside = folder / f"{FILE}.tmp"
    try:
        save_file(trainer.optimizer_state(), beside, {"run": run})
    except SafetensorError as error:  # of a full disk too
        raise OSError(str(error)) from error
    beside.replace(folder / FILE)


def read(trainer: TorchTrainer, folder: Path, run: str = "") -> None:
    """Take up what lies there, if it is of this run and fits."""
    with contextlib.suppress(OSError, SafetensorError, ValueError):
        with safe_open(folder / FILE, "pt") as file:
            told = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if told.get("run") == run:
            trainer.load_optimizer_state(state)
