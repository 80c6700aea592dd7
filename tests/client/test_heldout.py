"""Held out: what a client keeps out of its training, and what it makes of a model by it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from atoll.client.data import Split
from atoll.client.flat import PIECE
from atoll.client.heldout import FEWEST, MOST, cut, held_share
from atoll.client.local import TorchTrainer
from atoll.client.models import manifest_of, named_tensors
from atoll.client.objective import loss_of
from atoll.client.trainer import Task
from atoll.protocols.errors import DataError, UsageError
from atoll.protocols.manifest import TRAVELLING
from atoll.protocols.tensors import flatten

N = PIECE + 60  # examples: two pieces


def examples(n: int, seed: int = 0) -> Split:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return Split(x, x[:, :3].argmax(dim=1))


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = (nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3))
        return nn.Sequential(*body)


def trainer(held: Split | None) -> TorchTrainer:
    return TorchTrainer(net(), examples(50), held=held)


def model(module: nn.Module) -> dict[str, Tensor]:
    named, manifest = dict(named_tensors(module)), manifest_of(module)
    return {group: flatten(manifest, named, group).clone() for group in TRAVELLING}


# ---- which examples ------------------------------------------------------------------------------


def test_what_is_held_out_is_apart_the_same_every_time_and_each_clients_own() -> None:
    rows = np.arange(100, 400)
    rest, held = cut(rows, 0.1, 7, "a")
    assert len(held) == 30
    assert sorted([*rest, *held]) == list(rows)
    assert list(rest) == sorted(rest)
    again = cut(rows, 0.1, 7, "a")
    assert [list(part) for part in again] == [list(rest), list(held)]
    for other in (cut(rows, 0.1, 7, "b"), cut(rows, 0.1, 8, "a")):
        assert list(other[1]) != list(held)


@pytest.mark.parametrize(("n", "share", "held"), [(94, 0.1, 0), (99, 0.1, 10), (90_000, 0.1, MOST)])
def test_too_few_are_none_and_no_more_than_are_of_use(n: int, share: float, held: int) -> None:
    rest, apart = cut(np.arange(n), share, 0, "a")
    assert (len(rest), len(apart)) == (n - held, held)


OF = ("a", "digits", "iid", "0/2", "0")


@pytest.mark.parametrize(
    ("own", "wish", "found"),
    [(None, 0.1, 0.1), (0.3, 0.1, 0.3), (0.0, 0.1, 0.0), (None, 0.0, 0.0), (0.3, 0.0, 0.0)],
)
def test_a_client_holds_out_what_it_wants_where_the_run_asks_about_it(
    own: float | None, wish: float, found: float
) -> None:
    assert held_share(None, own, wish, "run", OF) == found


def test_a_client_that_starts_again_judges_on_nothing_that_it_has_trained_on(
    tmp_path: Path, synced: list[str]
) -> None:
    """Started anew with a greater share it held examples out that it had trained on."""
    assert held_share(None, 0.3, 0.1, "run", OF) == 0.3  # without a folder there is no second life
    assert held_share(tmp_path, 0.2, 0.1, "run", OF) == 0.2
    assert synced == [str(tmp_path / "held.json.tmp"), str(tmp_path)]
    assert held_share(tmp_path, 0.2, 0.1, "run", OF) == 0.2
    assert len(synced) == 2
    with pytest.raises(UsageError) as refused:
        held_share(tmp_path, 0.3, 0.1, "run", OF)
    assert (refused.value.code, refused.value.message, refused.value.hint) == (
        "FL-S108",
        "--validate 0.3, but in this run this client may have trained on all but 0.2 of these "
        "examples",
        "give 0.2 or less, or another --dir",
    )
    assert held_share(tmp_path, None, 0.1, "run", OF) == 0.1
    assert held_share(tmp_path, None, 0.2, "run", OF) == 0.1  # the run's wish is no order
    assert held_share(tmp_path, None, 0.2, "another run", OF) == 0.2


def test_what_was_held_out_of_other_examples_says_nothing_of_these(tmp_path: Path) -> None:
    assert held_share(tmp_path, None, 0.1, "run", OF) == 0.1
    assert held_share(tmp_path, None, 0.1, "run", (*OF[:3], "1/2", "0")) == 0.0
    with pytest.raises(UsageError, match="trained on all but 0 of these examples") as refused:
        held_share(tmp_path, 0.1, 0.1, "run", OF)
    assert refused.value.hint == "give 0, or another --dir"


@pytest.mark.parametrize("torn", [b"", b"[]", b'{"run":"run"}', b"\xff", b'{"share":"x"}'])
def test_where_that_cannot_be_read_nothing_is_held_out(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / "held.json").write_bytes(torn)
    assert held_share(tmp_path, None, 0.1, "run", OF) == 0.0


def test_of_a_smaller_share_all_lies_in_a_greater_ones() -> None:
    rows = np.arange(300)
    few, many = cut(rows, 0.1, 7, "a")[1], cut(rows, 0.2, 7, "a")[1]
    assert {*few.tolist()} < {*many.tolist()}


# ---- what it says --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_statistics", [True, False])
def test_it_says_the_loss_and_its_gradient_without_dropout(batch_statistics: bool) -> None:
    held = examples(N, seed=1)
    validator = trainer(held).validator
    assert validator is not None
    of = net()
    with torch.no_grad():
        of[1].running_var.mul_(4.0)  # type: ignore[index]
    given = model(of)
    loss, n, slope = validator.judge(given, True, batch_statistics)
    of.eval()
    of[1].train(batch_statistics)  # type: ignore[index]
    total = torch.zeros(())
    for part in torch.arange(N).chunk(2):  # batch statistics are those of a piece
        batch = held.x[part], held.y[part]
        total = total + loss_of(of, batch, "classification") * (len(part) / N)
    torch.autograd.backward(total)
    wanted = torch.cat([p.grad.reshape(-1) for p in of.parameters() if p.grad is not None])
    assert n == N
    assert loss == pytest.approx(total.item(), rel=1e-5)
    assert slope is not None
    assert torch.allclose(slope, wanted, atol=1e-6)
    alone, _, none = validator.judge(given, False, batch_statistics)
    assert alone == pytest.approx(loss, rel=1e-5)
    assert none is None


def test_with_too_few_it_declines_and_says_why() -> None:
    validator = trainer(examples(FEWEST - 1)).validator
    assert validator is not None
    with pytest.raises(DataError, match="9 examples are held out") as declined:
        validator.judge(model(net()), True, True)
    assert declined.value.code == "FL-D105"


def test_who_holds_nothing_out_is_no_validator() -> None:
    assert trainer(None).validator is None


def test_judging_leaves_the_training_alone() -> None:
    """It is asked while it trains: same examples, same dropout, same statistics."""
    plain, asked = trainer(None), trainer(examples(40, seed=1))
    assert asked.validator is not None
    task = Task(5, 0, {}, lambda: None, lambda _: None, lambda _: None)
    plain.train(task)

    def between(step: int) -> None:
        assert asked.validator is not None
        asked.validator.judge(model(net()), True, True)

    asked.train(Task(5, 0, {}, lambda: None, between, lambda _: None))
    for (name, one), (_, other) in zip(
        named_tensors(plain.model), named_tensors(asked.model), strict=True
    ):
        assert torch.equal(one, other), name
