"""The keep: private state changes when its work was used, and a kill anywhere never splits it."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atoll.client.keep import HELD, PENDING, Keep, Named, Rule, Sent, added, nothing_sent
from atoll.protocols.errors import ClientError


class Variates(Rule):
    """As in the module's docstring: counts once it was used."""

    def used(self, held: Named, pending: Named, sent: Sent) -> Named:
        return {"c": added(held.get("c"), pending["dc"])}


class Residual(Rule):
    """As in the module's docstring: counts at once, given back if unused."""

    def seen(self, held: Named, pending: Named) -> Named:
        return {"e": added(held.get("e"), pending["change"])}

    def used(self, held: Named, pending: Named, sent: Sent) -> Named:
        return self.seen(held, pending)

    def discarded(self, held: Named, pending: Named, sent: Sent) -> Named:
        return {"e": added(self.seen(held, pending)["e"], sent("trainable"))}


def opened(folder: Path | None, run: str = "r") -> Keep:
    keep = Keep(folder)
    keep.register("variates", Variates())
    keep.register("residual", Residual())
    keep.enter(run)
    return keep


def dc(*values: float) -> dict[str, Named]:
    return {"variates": {"dc": torch.tensor(values)}}


def change(*values: float) -> dict[str, Named]:
    return {"residual": {"change": torch.tensor(values)}}


def sends(*values: float) -> Sent:
    def sent(group: str) -> Tensor:
        assert group == "trainable"
        return torch.tensor(values)

    return sent


def values(keep: Keep, kind: str) -> list[float]:
    return [x for tensor in keep.now(kind).values() for x in tensor.tolist()]


@pytest.fixture(params=["disk", "memory"])
def keep(request: pytest.FixtureRequest, tmp_path: Path) -> Keep:
    return opened(tmp_path / "keep" if request.param == "disk" else None)


def test_a_control_variate_changes_when_its_update_was_used(keep: Keep) -> None:
    keep.hold("o1.0", dc(1, 2))
    assert values(keep, "variates") == []
    keep.settle("o1.0", "used", nothing_sent)
    assert values(keep, "variates") == [1, 2]
    keep.hold("o2.0", dc(10, 10))
    keep.settle("o2.0", "discarded", nothing_sent)
    assert values(keep, "variates") == [1, 2]


@pytest.mark.parametrize("fate", ["discarded", "superseded"])
def test_a_residual_counts_at_once_and_gets_all_that_was_not_used_back(
    keep: Keep, fate: str
) -> None:
    keep.hold("o1.0", change(0.5))  # of a delta of 2.5 it sent 2.0
    assert values(keep, "residual") == [0.5]
    keep.settle("o1.0", fate, sends(2.0))
    assert values(keep, "residual") == [2.5]
    keep.hold("o2.0", change(-1.5))  # 1.0 of what it had is on its way
    assert values(keep, "residual") == [1.0]
    keep.settle("o2.0", "used", sends(9.0))
    assert values(keep, "residual") == [1.0]


def test_outcomes_may_come_in_any_order(keep: Keep) -> None:
    for order, by in ((1, 1.0), (2, 10.0), (3, 100.0)):
        keep.hold(f"o{order}.0", dc(by) | change(by))
    assert (values(keep, "variates"), values(keep, "residual")) == ([], [111])
    keep.settle("o3.0", "used", nothing_sent)
    keep.settle("o1.0", "discarded", sends(0.25))
    assert (values(keep, "variates"), values(keep, "residual")) == ([100], [111.25])
    keep.settle("o2.0", "used", nothing_sent)
    assert (values(keep, "variates"), values(keep, "residual")) == ([110], [111.25])


def test_an_outcome_told_twice_counts_once(keep: Keep) -> None:
    keep.hold("o1.0", dc(1))
    for _ in range(2):
        keep.settle("o1.0", "used", nothing_sent)
    keep.settle("o9.0", "used", nothing_sent)  # of an update that made no state
    assert values(keep, "variates") == [1]


def test_what_is_held_is_a_copy(keep: Keep) -> None:
    mine = torch.ones(1)
    keep.hold("o1.0", {"variates": {"dc": mine}})
    mine.fill_(9)
    keep.settle("o1.0", "used", nothing_sent)
    assert values(keep, "variates") == [1]


def test_an_order_trained_again_replaces_what_it_held(keep: Keep) -> None:
    keep.hold("o1.0", dc(1))
    keep.hold("o1.0", dc(2))
    keep.settle("o1.0", "used", nothing_sent)
    assert values(keep, "variates") == [2]
    keep.hold("o2.0", dc(3))
    keep.hold("o2.0", {"variates": {}})
    assert not keep.announce("o2.0")


def test_state_outlives_its_process_pending_and_held(tmp_path: Path) -> None:
    keep = opened(tmp_path)
    keep.hold("o1.0", dc(1) | change(5))
    keep.settle("o1.0", "used", nothing_sent)
    keep.hold("o2.0", dc(2) | change(7))
    again = opened(tmp_path)
    assert again.life == keep.life
    assert (values(again, "variates"), values(again, "residual")) == ([1], [12])
    assert again.report() == {"residual": 2, "variates": 2}
    again.retain(["o2.0"])
    again.settle("o2.0", "used", nothing_sent)
    assert values(opened(tmp_path), "variates") == [3]
    assert not list(tmp_path.glob(f"*{PENDING}"))


def test_what_was_held_for_a_result_that_never_was_is_dropped(tmp_path: Path) -> None:
    """Killed between the state and the result: the order is trained again."""
    keep = opened(tmp_path)
    keep.hold("o1.0", change(5))
    again = opened(tmp_path)
    again.retain([])
    assert values(again, "residual") == []
    assert not list(tmp_path.glob(f"*{PENDING}"))


def test_a_kill_while_settling_neither_loses_nor_doubles_the_change(tmp_path: Path) -> None:
    """Each order of what reaches the disk: state renamed, pending file removed."""
    before, middle, after = tmp_path / "before", tmp_path / "middle", tmp_path / "after"
    keep = opened(after)
    keep.hold("o1.0", dc(1))
    shutil.copytree(after, before)
    (before / "held.tmp").write_bytes(b"half of the ne")
    keep.settle("o1.0", "used", nothing_sent)
    shutil.copytree(after, middle)
    shutil.copy(before / f"o1.0{PENDING}", middle)
    for folder in (before, middle, after):
        found = opened(folder)
        found.retain(["o1.0"])
        found.settle("o1.0", "used", nothing_sent)  # told again: it was not acknowledged
        assert values(found, "variates") == [1], folder.name
        assert sorted(p.name for p in folder.iterdir()) == [HELD], folder.name


@pytest.mark.parametrize("torn", [HELD, f"o2.0{PENDING}"])
def test_damaged_state_is_lost_as_a_whole_and_says_so(tmp_path: Path, torn: str) -> None:
    keep = opened(tmp_path)
    keep.hold("o1.0", dc(1))
    keep.settle("o1.0", "used", nothing_sent)
    keep.hold("o2.0", dc(2))
    data = bytearray((tmp_path / torn).read_bytes())
    data[-3] ^= 1
    (tmp_path / torn).write_bytes(data)
    again = opened(tmp_path)
    assert torn in again.lost
    assert again.life != keep.life
    assert again.report() == {"residual": 0, "variates": 0}
    assert values(again, "variates") == []
    assert not list(tmp_path.iterdir())


def test_another_run_starts_with_nothing(tmp_path: Path) -> None:
    keep = opened(tmp_path)
    keep.hold("o1.0", dc(1))
    keep.settle("o1.0", "used", nothing_sent)
    keep.hold("o2.0", dc(2))
    other = opened(tmp_path, run="other")
    assert values(other, "variates") == []
    assert other.report() == {"residual": 0, "variates": 0}
    assert other.life != keep.life
    assert not list(tmp_path.iterdir())


def test_an_order_waits_for_an_outcome_that_came_before_it() -> None:
    keep = opened(None)
    keep.hold("o1.0", dc(1))
    assert keep.announce("o1.0")
    seen: list[list[float]] = []
    training = threading.Thread(target=lambda: seen.append(values(keep, "variates")))
    training.start()
    assert not seen
    keep.settle("o1.0", "used", nothing_sent)
    training.join()
    assert seen == [[1]]


def test_nobody_waits_for_a_keep_that_was_closed() -> None:
    keep = opened(None)
    keep.hold("o1.0", dc(1))
    keep.announce("o1.0")
    keep.close()
    assert values(keep, "variates") == []


def test_a_full_disk_changes_nothing_and_is_told(tmp_path: Path) -> None:
    keep = opened(tmp_path)
    keep.hold("o1.0", dc(1))
    (tmp_path / "held.tmp").mkdir()  # what is in the way of any write
    with pytest.raises(ClientError, match="FL-S203"):
        keep.settle("o1.0", "used", nothing_sent)
    assert values(keep, "variates") == []
    (tmp_path / "held.tmp").rmdir()
    keep.settle("o1.0", "used", nothing_sent)
    assert values(keep, "variates") == [1]


@pytest.mark.parametrize("name", [HELD, "held.tmp"])
def test_a_directory_in_place_of_a_state_is_told_by_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ClientError, match=rf"FL-S203: .*: {name}: Is a directory"):
        Keep(tmp_path)


def test_a_kind_whose_rule_is_unknown_here_is_left_as_it_is() -> None:
    keep = opened(None)
    keep.hold("o1.0", {"other": {"x": torch.ones(1)}})
    keep.settle("o1.0", "used", nothing_sent)
    assert keep.now("other") == {}


def test_a_simulation_gives_its_keeps_their_lives() -> None:
    assert Keep(None, life=7).life == 7


def test_a_rule_must_say_what_used_means() -> None:
    with pytest.raises(TypeError, match="used"):
        Rule()  # type: ignore[abstract]
    with pytest.raises(KeyError):
        nothing_sent("trainable")
