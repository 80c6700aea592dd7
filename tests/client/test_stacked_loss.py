"""The loss of many clients at once: torch's own numbers, whichever way the logits stand."""

import pytest
import torch
from torch import nn

from atoll.client import stacked_loss
from atoll.client.stacked_loss import StackedLoss, columns_agree, mean_losses


@pytest.mark.parametrize("classes", [1, 2, 10, 15, 16, 17, 40])
@pytest.mark.parametrize(("many", "rows"), [(1, 1), (3, 7), (4, 32), (5, 100)])
@pytest.mark.parametrize("columns", [True, False])  # where they may be taken, or never
def test_losses_and_gradients_have_torchs_bits(
    classes: int, many: int, rows: int, columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not columns:
        monkeypatch.setattr(stacked_loss, "columns_agree", lambda classes: False)
    generator = torch.Generator().manual_seed(rows)
    labels = torch.randint(0, classes, (3, many, rows), generator=generator)
    loss = StackedLoss(labels, classes)
    losses = torch.zeros(3, many)
    for step in range(3):
        logits = 3 * torch.randn(many, rows, classes, generator=generator)
        found = loss.gradient(step, logits)
        for k in range(many):
            z = logits[k].requires_grad_()
            mean = nn.functional.cross_entropy(z, labels[step, k])
            (expected,) = torch.autograd.grad(mean, z)
            assert torch.equal(found[k], expected)
            losses[step, k] = mean.detach()
    assert torch.equal(loss.means(), losses)


def test_those_who_are_done_are_left_out() -> None:
    labels = torch.tensor([[[0, 1], [2, 0]], [[1, 1], [0, 0]]])
    loss = StackedLoss(labels, 3)
    logits = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loss.gradient(0, logits)[:1], loss.gradient(1, logits[:1])) is False
    again = StackedLoss(labels[[1]], 3).gradient(0, logits)
    assert torch.equal(loss.gradient(1, logits[:1]), again[:1])


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 18, 32, 33, 100, 255, 256])
def test_mean_losses_are_summed_in_torchs_order(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    log_p = torch.randn(3, 4, rows, 5, generator=generator).log_softmax(3)
    right = torch.randint(0, 5, (3, 4, rows), generator=generator)
    picked = log_p.gather(3, right.unsqueeze(3)).squeeze(3)
    for step, losses in enumerate(mean_losses(picked)):
        for k in range(4):
            assert losses[k] == nn.functional.nll_loss(log_p[step, k], right[step, k])


def test_the_way_of_few_classes_is_found_out() -> None:
    """With as many as fit into a vector of AVX-512 columns differ: they must not be taken."""
    assert not columns_agree(40)
