"""Proxy data: drawn evenly, apart from the test set, with every class; and the errors where not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from atoll.client.data import Data, DataInfo, Examples, Split, from_user, load_data, size
from atoll.client.proxy import Wanted, checked, drawn, held_out, prints, proxy_data
from atoll.protocols.errors import DataError
from tests.conftest import Logged


def blobs(n: int = 400) -> Data:
    return load_data(f"synthetic:examples={n},classes=4,features=3")


def test_it_is_drawn_evenly_from_the_training_part() -> None:
    """200 of digits: 20 of each of 10 classes, none of them a test picture."""
    digits = load_data("digits")
    found = proxy_data("digits", digits, seed=0)
    assert size(found.train) == 200
    assert np.bincount(found.labels()).tolist() == [20] * 10
    test: Examples | None = digits.test
    assert test is not None
    assert not set(prints(found.train)) & set(prints(test))
    assert set(prints(found.train)) < set(prints(digits.train))


def test_a_rare_class_gives_all_it_has() -> None:
    labels = torch.tensor([0] * 50 + [1] * 3)
    data = Data(DataInfo((2,), 2), Split(torch.randn(53, 2), labels))
    found = drawn(data, 10, seed=0)
    assert np.bincount(labels.numpy()[found]).tolist() == [7, 3]
    assert found.tolist() == sorted(found.tolist())


def test_the_seed_draws_it() -> None:
    data = blobs()
    assert drawn(data, 20, 1).tolist() == drawn(data, 20, 1).tolist()
    assert drawn(data, 20, 1).tolist() != drawn(data, 20, 2).tolist()
    assert len(drawn(data, None, 1)) == size(data.train)
    assert len(drawn(data, 10_000, 1)) == size(data.train)


def test_what_has_no_classes_is_drawn_at_random() -> None:
    train = Split(torch.randn(50, 2), torch.randn(50))
    data = Data(DataInfo((2,), 1, "regression"), train)
    assert len(set(drawn(data, 20, 0).tolist())) == 20
    assert checked(data, None) is data


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("digits", Wanted("digits")),
        ("digits:take=50", Wanted("digits", 50)),
        ("npz:a,b.npz,take=all,missing=ok", Wanted("npz:a,b.npz", None, True)),
        ("mine:data:take=30", Wanted("mine:data", 30)),
        ("csv:f.csv,target=y,take=40", Wanted("csv:f.csv,target=y", 40)),
    ],
)
def test_its_own_options_stand_among_those_of_the_source(spec: str, wanted: Wanted) -> None:
    assert Wanted.of(spec) == wanted


@pytest.mark.parametrize("value", ["", "some", "1", "-3", "4.5"])
def test_how_many_to_take_is_told_in_one_sentence(value: str) -> None:
    """What was empty or no word was taken for an option of the data, which "has none"."""
    with pytest.raises(DataError) as refused:
        Wanted.of(f"digits:take={value},missing=ok")
    assert (refused.value.code, refused.value.message, refused.value.hint) == (
        "FL-D103",
        f"proxy data: take={value!r}",
        "write take=N with N of at least 2, or take=all",
    )


@pytest.mark.parametrize(
    "spec", ["digits:take=some", "digits:take=1", "digits:missing=few", "digits:missing="]
)
def test_an_option_nobody_can_mean_is_refused(spec: str) -> None:
    with pytest.raises(DataError) as caught:
        Wanted.of(spec)
    assert caught.value.code == "FL-D103"


def test_an_example_of_the_test_set_is_refused() -> None:
    data = blobs()
    assert isinstance(data.train, Split)
    assert isinstance(data.test, Split)
    mixed = replace(data.train, raw=torch.cat([data.train.raw, data.test.raw[:3]]),
                    y=torch.cat([data.train.y, data.test.y[:3]]))  # fmt: skip
    with pytest.raises(DataError, match="3 of 323") as caught:
        checked(Data(data.info, mixed), data)
    assert caught.value.code == "FL-D106"
    assert checked(Data(data.info, data.train), data).train is data.train


def test_data_of_another_kind_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"shape is not the run's: \(1, 8, 8\), not \(3,\)"
    ) as caught:
        proxy_data("digits", blobs(), 0)
    assert caught.value.code == "FL-D106"
    more = replace(blobs().info, classes=5)
    with pytest.raises(DataError, match="number of classes is not the run's: 5, not 4"):
        checked(Data(more, blobs().train), blobs())


def test_a_file_that_lacks_the_last_class_lacks_a_class() -> None:
    """It looks as if there were fewer classes at all."""
    data = blobs()
    three = data.shard(np.flatnonzero(data.labels() != 3))
    without = Data(replace(data.info, classes=3), three)
    with pytest.raises(DataError, match="class 3") as caught:
        checked(without, data)
    assert caught.value.code == "FL-D107"
    assert checked(without, data, lacking=True).info == data.info


def test_a_missing_class_is_refused_unless_it_is_meant(logged: Logged) -> None:
    data = blobs()
    assert isinstance(data.train, Split)
    without = Data(data.info, data.train.take(np.flatnonzero(data.labels() != 2)))
    with pytest.raises(DataError, match="class 2") as caught:
        checked(without, data)
    assert caught.value.code == "FL-D107"
    assert checked(without, data, lacking=True) is without
    assert "class 2 has fewer than 10" in logged.text


def test_one_example_is_no_data() -> None:
    data = blobs()
    with pytest.raises(DataError) as caught:
        checked(Data(data.info, data.shard(np.array([0]))), data)
    assert caught.value.code == "FL-D105"


def test_a_simulation_keeps_it_from_the_clients() -> None:
    data = replace(blobs(), columns={"site": [str(i) for i in range(320)]})
    spec = "synthetic:examples=400,classes=4,features=3"
    rest = held_out(f"{spec},take=40", spec, data, 0)
    taken = drawn(data, 40, 0)
    assert size(rest.train) == 280
    assert rest.test is data.test
    assert set(rest.columns["site"]).isdisjoint(str(i) for i in taken)
    assert not set(prints(rest.train)) & set(prints(data.shard(taken)))
    assert held_out("digits", spec, data, 0) is data
    with pytest.raises(DataError):
        held_out(f"{spec},take=all", spec, data, 0)


class Words(Dataset[object]):
    """Items as a user may have them."""

    def __init__(self, items: list[object]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, at: int) -> object:
        return self.items[at]


def test_any_items_have_a_fingerprint() -> None:
    same: list[object] = [("a cat", 0), {"x": 1}, torch.ones(2), np.ones(2), (1.5, 2)]
    found = list(prints(Words(same)))
    assert found == list(prints(Words(same)))
    assert len(set(found)) == 4  # a tensor and an array of the same numbers are the same


def test_a_split_and_a_dataset_of_the_same_pictures_have_the_same_prints() -> None:
    split = Split(torch.arange(6, dtype=torch.uint8).view(3, 2), torch.zeros(3).long(), scale=0.5)
    items: list[object] = [(x, 0) for x in split.x]
    assert list(prints(split)) == list(prints(Words(items)))


def test_a_users_dataset_can_be_proxy_data() -> None:
    items: list[object] = [(torch.randn(3), i % 4) for i in range(60)]
    found = checked(from_user((Words(items), Words(items)), "mine", 0), None)
    assert size(found.train) == 60
