"""The local optimizer's state lives from order to order, and from process to process."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from atoll.client.data import Split
from atoll.client.local import LocalConfig, TorchTrainer
from atoll.client.outbox import Outbox
from atoll.client.work import Workbench
from atoll.protocols import tensors
from atoll.protocols.blobs import BlobInfo
from atoll.protocols.codecs import codec
from atoll.protocols.errors import ClientError
from atoll.protocols.messages import Order

CONFIG = LocalConfig(lr=0.01, batch=4, optimizer="adamw", keep_optimizer_state=True, device="cpu")


def trainer() -> TorchTrainer:
    generator = torch.Generator().manual_seed(0)
    data = Split(torch.randn(40, 6, generator=generator), torch.arange(40) % 3)
    torch.manual_seed(1)
    return TorchTrainer(nn.Linear(6, 3), data, config=CONFIG)


class Client:
    """One process of a client that has a folder."""

    def __init__(self, folder: Path, run: str) -> None:
        self.outbox = Outbox(folder)
        self.outbox.enter(run)
        self.trainer = trainer()
        self.bench = Workbench(
            self.trainer, self.trainer.manifest, codec("fp32"), codec("fp32"), self.outbox
        )

    def order(self, number: int) -> Tensor:
        """What five steps from zeros make of the model."""
        sections = tensors.sections_of(self.trainer.manifest, codec("fp32"))
        data = bytes(sum(section.length for section in sections))
        info = BlobInfo("v0/fp32", len(data), hashlib.sha256(data).digest(), sections)
        given = Order(f"o{number}", 0, 0, 5, info, data, {})

        def unused(*_: object) -> None:
            raise AssertionError

        self.bench.do(given, unused, lambda: None, lambda step: None, unused)
        return self.trainer.export()["weight"].clone()

    def ends(self) -> None:
        self.outbox.close()


def test_a_disk_that_does_not_take_the_moments_is_told(tmp_path: Path) -> None:
    """What safetensors raises of a full disk is no OSError: it was called a bug."""
    one = Client(tmp_path, "R")
    (tmp_path / "inner.safetensors.tmp").mkdir()
    with pytest.raises(ClientError, match="cannot be written") as refused:
        one.order(1)
    assert refused.value.code == "FL-S203"
    one.ends()


def test_a_client_that_was_restarted_goes_on_with_its_moments(tmp_path: Path) -> None:
    one = Client(tmp_path / "one", "R")
    without = [one.order(1), one.order(2)]
    one.ends()
    other = Client(tmp_path / "other", "R")
    first = other.order(1)
    other.ends()
    other = Client(tmp_path / "other", "R")
    assert torch.equal(first, without[0])
    assert torch.equal(other.order(2), without[1])
    other.ends()


@pytest.mark.parametrize("harm", ["another run", "torn", "gone", "another shape"])
def test_what_is_not_its_own_or_not_whole_is_not_taken_up(tmp_path: Path, harm: str) -> None:
    fresh = Client(tmp_path / "fresh", "R")
    fresh.outbox.steps = 5
    wanted = fresh.order(2)  # the second order's data, without moments
    fresh.ends()
    client = Client(tmp_path / "client", "R")
    client.order(1)
    file = tmp_path / "client" / "inner.safetensors"
    assert file.stat().st_size > 2 * 6 * 3 * 4
    if harm == "torn":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "gone":
        file.unlink()
    elif harm == "another shape":
        from safetensors.torch import save_file

        save_file({"weight/exp_avg": torch.ones(2)}, file, {"run": "R"})
    client.ends()
    again = Client(tmp_path / "client", "other" if harm == "another run" else "R")
    if harm == "another run":
        again.outbox.steps = 5
    assert again.outbox.steps == 5
    assert torch.equal(again.order(2), wanted)
    again.ends()
