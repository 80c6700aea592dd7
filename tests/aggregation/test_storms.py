"""Peers in virtual time, seeds x faults: no fork, no stall, the exact mean of who is in it."""

import pytest

from atoll.p2p.outcome import Outcome
from atoll.p2p.storms import EPOCHS, main, storm, try_storm
from atoll.p2p.virtual import Swarm
from atoll.p2p.world import PeerModel, Weather
from tests.seeds import seeds

FAST, ALL = 40, 10_000  # seeds
A_TENTH = ALL // 10


def check(seed: int) -> Outcome:
    outcome = try_storm(seed)
    assert outcome.good, f"seed {seed}: {outcome}"
    assert outcome.headless or outcome.epochs >= EPOCHS, f"seed {seed}: {outcome}"
    return outcome


def test_no_storm_forks_stalls_or_makes_a_wrong_mean() -> None:
    outcomes = [check(seed) for seed in range(FAST)]
    assert sum(o.headless for o in outcomes) < FAST / 20  # else nothing much was tried


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("tenth", range(10))
def test_ten_thousand_storms(tenth: int) -> None:
    for seed in range(tenth * A_TENTH, (tenth + 1) * A_TENTH):
        check(seed)


def test_the_same_seed_gives_the_same_run() -> None:
    assert storm(5).run(EPOCHS) == storm(5).run(EPOCHS)


def test_the_search_says_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    found = main(2)
    assert (found["swarms"], found["forks"], found["wrong means"], found["stalls"]) == (2, 0, 0, 0)
    assert capsys.readouterr().out.startswith("2 swarms, 0 forks, 0 wrong means, 0 stalls")


def test_four_peers_average_all_of_their_work_each_round() -> None:
    outcome = Swarm([PeerModel(name) for name in "abcd"], seed=1).run(epochs=5)
    assert outcome.good
    assert outcome.seconds < 5 * (1.2 + 1.0)  # a round is the slowest's work, and at most a second
    assert set(outcome.commits.values()) == {(("a", "b", "c", "d"), (1.0,) * 4)}


@pytest.mark.parametrize("seed", seeds(6, of=20))
def test_survivors_of_a_death_in_the_middle_of_a_reduce_are_done_in_five_seconds(
    seed: int,
) -> None:
    for dying in "abcd":
        calm, ends = Swarm([PeerModel(p) for p in "abcd"], seed=seed).run(1).seconds, []
        for before in (0.02, 0.08, 0.15):
            died = calm - before
            peers = [PeerModel(p, dies=died if p == dying else 1e9) for p in "abcd"]
            outcome = Swarm(peers, seed=seed).run(1)
            assert outcome.good
            assert outcome.epochs == 1
            ends.append(outcome.seconds - died)
        assert max(ends) < 5, f"{dying} dies: {ends}"


def test_a_network_in_two_forks_nothing_and_goes_on_where_most_are() -> None:
    parted = ((1.5, 20.0, frozenset("de")),)
    swarm = Swarm([PeerModel(name) for name in "abcde"], Weather(parted=parted), seed=3)
    outcome = swarm.run(epochs=25)
    assert outcome.good
    groups = [group for group, _ in outcome.commits.values()]
    assert ("a", "b", "c") in groups
    assert not any(set(group) <= {"d", "e"} for group in groups)
    assert groups[-1] == ("a", "b", "c", "d", "e")  # the others came back


def test_half_without_the_first_waits_until_the_network_heals() -> None:
    parted = ((1.5, 20.0, frozenset("a")),)
    peers = [PeerModel("a", dies=2.0), PeerModel("b")]
    outcome = Swarm(peers, Weather(parted=parted), seed=3).run(epochs=9, until=60)
    assert outcome.headless
    assert not outcome.forks


def test_a_slow_peer_is_waited_for_until_patience_ends_and_gets_the_model_all_the_same() -> None:
    outcome = Swarm([PeerModel("a"), PeerModel("b", pace=60.0)], seed=1).run(epochs=3)
    assert outcome.good
    assert outcome.commits[1] == (("a", "b"), (1.0, 0.0))


def test_work_that_is_not_finite_weighs_nothing() -> None:
    outcome = Swarm([PeerModel("a", spoils=1), PeerModel("b")], seed=1).run(epochs=3)
    assert outcome.good
    assert outcome.commits[1][1] == (1.0, 1.0)
    assert outcome.commits[2][1] == (0.0, 1.0)


@pytest.mark.parametrize("seed", seeds(6, of=20))
def test_one_that_lies_all_the_time_neither_stalls_the_others_nor_weighs_more_than_its_share(
    seed: int,
) -> None:
    """Wherever it stands in the order, so also where it is the one that proposes."""
    for lying in "abcd":
        peers = [PeerModel(p, weight=2.0, lies=p == lying) for p in "abcd"]
        outcome = Swarm(peers, seed=seed).run(epochs=3, until=30)
        assert outcome.good, f"{lying} lies: {outcome}"
        weights = {w for _, by in outcome.commits.values() for w in by}
        assert weights <= {0.0, 2.0}, f"{lying} lies: {outcome}"


def test_a_late_joiner_counts_from_its_first_whole_round() -> None:
    outcome = Swarm([PeerModel("a"), PeerModel("b"), PeerModel("q", joins=3.2)], seed=2).run(6)
    assert outcome.good
    assert ("a", "b") in {group for group, _ in outcome.commits.values()}
    assert outcome.commits[6] == (("a", "b", "q"), (1.0, 1.0, 1.0))


def test_peers_leave_one_by_one_and_the_last_goes_on() -> None:
    peers = [PeerModel("a", leaves=2.2), PeerModel("b", leaves=4.0), PeerModel("c")]
    outcome = Swarm(peers, seed=1).run(epochs=8)
    assert outcome.good
    assert outcome.commits[8] == (("c",), (1.0,))
