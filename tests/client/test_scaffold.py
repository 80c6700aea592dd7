"""Hooks of the local loop that momentum methods stand on, and their state on the client."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from atoll.aggregation.half import Half
from atoll.client.algorithm import Again, LocalAlgorithm, Params, count, flat_like, split
from atoll.client.algorithm import local_algorithm as named
from atoll.client.data import Split
from atoll.client.keep import Keep, Named
from atoll.client.local import LocalConfig, TorchTrainer
from atoll.client.models import manifest_of
from atoll.client.scaffold import KIND, ScaffoldM, Variate, standing
from atoll.client.trainer import Task
from atoll.protocols import tensors
from atoll.protocols.errors import ClientError, UsageError


class Net(nn.Module):
    """A bit of everything: dropout, running statistics, a parameter that no batch uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(6, 3)
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.drop(torch.relu(self.norm(self.first(x)))))
        return found


def trainer(algorithm: LocalAlgorithm, **local: float) -> TorchTrainer:
    torch.manual_seed(1)
    data = Split(torch.randn(40, 4), torch.arange(40) % 3)
    config = LocalConfig(lr=0.1, batch=8, device="cpu", **local)  # type: ignore[arg-type]
    return TorchTrainer(Net(), data, None, config, algorithm=algorithm)


class Twice(LocalAlgorithm):
    """Notes the gradients of a batch and those of a second look at the same weights."""

    reevaluates: ClassVar[bool] = True

    def __init__(self) -> None:
        self.looks: list[tuple[Tensor, Tensor]] = []

    def transform_grad(self, params: Params, again: Again) -> None:
        def grads() -> Tensor:
            return flat_like(p.grad for p in params.values() if p.grad is not None)

        first = grads().clone()
        again([p.detach().clone() for p in params.values()])
        self.looks.append((first, grads()))


def test_a_second_look_sees_the_same_dropout_and_moves_no_statistic() -> None:
    looking, plain = Twice(), trainer(named("plain"))
    watched = trainer(looking)
    found, expected = watched.train(Task(4)).tensors, plain.train(Task(4)).tensors
    assert all(torch.equal(first, second) for first, second in looking.looks)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


class Rounded(LocalAlgorithm):
    """The forward pass sees the signs of the weights; the weights themselves are stepped."""

    def view_weights(self, params: Params) -> Sequence[Tensor]:
        return [p.detach().sign() for p in params.values()]

    def transform_grad(self, params: Params, again: Again) -> None:
        self.seen = [None if p.grad is None else p.grad.clone() for p in params.values()]


def test_the_forward_pass_sees_other_weights_and_the_step_is_on_the_own() -> None:
    looking = Rounded()
    made = trainer(looking)
    before = [p.detach().clone() for p in made.model.parameters()]
    made.train(Task(1))
    for p, was, grad in zip(made.model.parameters(), before, looking.seen, strict=True):
        assert torch.allclose(p, was if grad is None else was - 0.1 * grad)
    plain = trainer(named("plain"))
    plain.train(Task(1))
    assert not torch.equal(plain.model.first.weight, made.model.first.weight)  # type: ignore[union-attr,arg-type]


def test_weight_decay_and_clipping_are_in_the_gradient_that_is_shared() -> None:
    """fedavg-m with beta 1 is plain training where both are on, to rounding."""
    options = {"weight_decay": 0.1, "clip": 0.05}
    plain, steered = (
        trainer(named("plain"), **options),
        trainer(named("fedavg-m:beta=1"), **options),
    )

    class Decayed(LocalAlgorithm):  # plain clips before it decays: so does none here
        steers: ClassVar[bool] = True

    same = trainer(Decayed(), **options)
    found, expected = steered.train(Task(3)).tensors, same.train(Task(3)).tensors
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    assert not torch.equal(plain.train(Task(3)).tensors["last.bias"], found["last.bias"])


def test_flat_vectors_lie_as_the_manifest_says() -> None:
    model = Net()
    params = dict(model.named_parameters())
    flat = tensors.flatten(manifest_of(model), dict(model.state_dict()), "trainable")
    assert count(params) == flat.numel()
    assert torch.equal(flat_like(params.values()), flat)
    for piece, p in zip(split(flat, params), params.values(), strict=True):
        assert torch.equal(piece, p)


# ---- SCAFFOLD's state --------------------------------------------------------------------------


def sent(**sections: float):  # type: ignore[no-untyped-def]
    return lambda group: torch.tensor([sections[group.removeprefix("extra:")]])


def pending(epoch: int, commits: int) -> Named:
    return {"epoch": torch.tensor(epoch), "commits": torch.tensor(commits)}


def test_the_client_commits_by_the_servers_rule() -> None:
    rule = Variate()
    held = rule.used({}, pending(0, 0), sent(dc=2.0))
    assert (float(held["c"]), int(held["commits"])) == (2.0, 1)
    assert rule.used(held, pending(0, 0), sent(dc=5.0)) is held  # rests on what was before
    held = rule.used(held, pending(0, 1), sent(dc=1.0))
    assert (float(held["c"]), int(held["commits"])) == (3.0, 2)
    assert rule.discarded(held, pending(0, 2), sent(dc=9.0)) is held


def test_a_new_epoch_makes_the_state_void() -> None:
    rule = Variate()
    held = rule.used({}, pending(0, 0), sent(dc=2.0))
    assert standing(held, 1) == (1, 0)
    anew = rule.used(held, pending(1, 0), sent(dc=7.0))
    assert (float(anew["c"]), int(anew["commits"]), int(anew["epoch"])) == (7.0, 1, 1)
    assert rule.used(anew, pending(0, 1), sent(dc=9.0)) is anew  # of the former epoch


def test_what_an_order_says_is_the_mean_raw_gradient_and_where_it_stands() -> None:
    """(u - (1 - beta) g) / beta + c_i - c is the mean of G(y): nothing of it needs the wire."""
    made = trainer(ScaffoldM(beta=0.5))
    size = made.manifest.counts["trainable"]
    g, c, mine = (torch.randn(size) * 0.1 for _ in range(3))
    held = {"c": mine, "commits": torch.tensor(2), "epoch": torch.tensor(0)}
    start = tensors.flatten(made.manifest, made.export(), "trainable")
    state: Mapping[str, Named] = {KIND: held}
    task = Task(
        6, extras={"direction": g, "control": c}, state=state.__getitem__,
        latest=state.__getitem__, life=11,
    )  # fmt: skip
    trained = made.train(task)
    assert trained.said == {"steps": 6.0, "lr": 0.1, "life": 11.0, "epoch": 0.0, "commits": 2.0}
    u = (start - tensors.flatten(made.manifest, trained.tensors, "trainable")) / (0.1 * 6)
    assert torch.allclose((u - 0.5 * g) / 0.5 + mine - c, trained.extras["dc"] + mine, atol=1e-5)


def test_with_a_table_the_client_keeps_nothing_and_answers_what_it_was_sent() -> None:
    made = trainer(named("scaffold-m:beta=0.5,table=server"))
    assert made.rules == {}
    size = made.manifest.counts["trainable"]
    g, c, mine = (torch.randn(size) * 0.1 for _ in range(3))
    extras = {"direction": g, "control": c, "variate": mine}
    sent = made.train(Task(6, extras=extras, extra={"commits": 3.0}))
    assert sent.said == {"steps": 6.0, "lr": 0.1, "commits": 3.0}
    assert sent.state == {}
    kept = trainer(ScaffoldM(beta=0.5))
    held = {"c": mine, "commits": torch.tensor(3), "epoch": torch.tensor(0)}
    state: Mapping[str, Named] = {KIND: held}
    same = kept.train(Task(6, extras=extras, state=state.__getitem__, latest=state.__getitem__))
    assert torch.equal(sent.extras["dc"], same.extras["dc"])
    assert all(torch.equal(sent.tensors[n], same.tensors[n]) for n in same.tensors)


def test_a_variate_that_should_have_come_and_did_not_is_one_clear_error() -> None:
    made = trainer(named("scaffold:table=server"))
    vectors = {"control": torch.zeros(made.manifest.counts["trainable"])}
    assert made.train(Task(1, extras=vectors)).said["commits"] == 0.0
    with pytest.raises(ClientError, match=r"FL-C103.*'variate', of which there are 2 changes"):
        made.train(Task(1, extras=vectors, extra={"commits": 2.0}))


@pytest.mark.parametrize("spec", ["scaffold", "scaffold-m", "scaffold-m-vr"])
def test_a_table_is_with_the_client_or_the_server(spec: str) -> None:
    with pytest.raises(UsageError, match=r"FL-S102.*one of client, server"):
        named(f"{spec}:table=peer")


@pytest.mark.parametrize("beta", [0.0, 1.5, float("nan")])
def test_a_beta_that_cannot_be_is_refused(beta: float) -> None:
    with pytest.raises(UsageError, match="FL-S102"):
        named(f"scaffold-m:beta={beta}")
    with pytest.raises(UsageError, match="FL-S102"):
        named(f"feddyn:alpha={-beta}")


def test_a_warm_start_takes_the_first_round_whole() -> None:
    cold, warm, plain = (
        trainer(named(spec))
        for spec in ("fedavg-m:beta=0.1", "fedavg-m:beta=0.1,warm=true", "plain")
    )
    first = [t.train(Task(2)).tensors["last.bias"].clone() for t in (cold, warm, plain)]
    assert torch.equal(first[1], first[2])
    assert not torch.equal(first[0], first[2])


@pytest.mark.parametrize(
    "spec", ["fedavg-m", "fedavg-m-vr", "scaffold", "scaffold-m", "scaffold-m-vr", "feddyn"]
)
def test_a_client_without_a_server_can_measure_its_pace(spec: str) -> None:
    made = trainer(named(spec))
    assert made.train(Task(2)).steps == 2
    assert isinstance(made.algorithm.server_half(), Half)
    keep = Keep(None)
    for kind, rule in made.rules.items():
        keep.register(kind, rule)
