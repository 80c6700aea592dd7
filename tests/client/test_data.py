"""Specs to data: the built-in sources, a user's own, and what is said where they cannot be used."""

import gzip
import struct
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from atoll.client.data import Data, DataInfo, Split, find_data, from_user, load_data
from atoll.client.topics import ALPHABET, library_text
from atoll.protocols.errors import DataError, UsageError

REAL = Path(__file__).parents[3] / "shared" / "data"


def refused(spec: str) -> DataError:
    with pytest.raises(DataError) as caught:
        load_data(spec)
    assert caught.value.hint
    return caught.value


# ---- digits --------------------------------------------------------------------------------


def test_digits_are_split_within_each_class_and_standardised() -> None:
    data = load_data("digits")
    assert isinstance(data.train, Split)
    assert isinstance(data.test, Split)
    assert data.info == DataInfo((1, 8, 8), 10)
    assert len(data.train) + len(data.test) == 1797
    every, held = (torch.bincount(y) for y in (torch.cat([data.train.y, data.test.y]), data.test.y))
    assert held.tolist() == [round(0.2 * n) for n in every.tolist()]
    assert data.train.x.dtype == torch.float32
    assert abs(float(data.train.x.mean())) < 0.01
    assert abs(float(data.train.x.std()) - 1) < 0.01


def test_the_split_is_the_seed_s() -> None:
    a, b, c = load_data("digits", 0), load_data("digits", 0), load_data("digits", 1)
    assert isinstance(a.train, Split)
    assert isinstance(b.train, Split)
    assert isinstance(c.train, Split)
    assert torch.equal(a.train.raw, b.train.raw)
    assert not torch.equal(a.train.y, c.train.y)


# ---- MNIST ---------------------------------------------------------------------------------


def idx(array: npt.NDArray[np.uint8]) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


def write_mnist(folder: Path, zipped: bool = False) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 6, 5), dtype=np.uint8)
    for part, n in (("train", 12), ("t10k", 4)):
        labels = (np.arange(n) % 3).astype(np.uint8)
        for name, array in ((f"{part}-images-idx3", images[:n]), (f"{part}-labels-idx1", labels)):
            content = idx(array)
            file = folder / f"{name}-ubyte{'.gz' if zipped else ''}"
            file.write_bytes(gzip.compress(content) if zipped else content)
    return images


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_give_normalised_pictures(tmp_path: Path, zipped: bool) -> None:
    images = write_mnist(tmp_path, zipped)
    data = load_data(f"mnist:{tmp_path}")
    assert isinstance(data.train, Split)
    assert data.info == DataInfo((1, 6, 5), 3)
    assert data.train.raw.dtype == torch.uint8
    expected = (images.astype(np.float64)[:, None] / 255 - 0.1307) / 0.3081
    np.testing.assert_allclose(data.train.x.numpy(), expected, atol=1e-6)
    assert data.train.y.tolist() == [0, 1, 2] * 4


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda b: b[:-1], "360 bytes, it has 359"),
        (lambda b: b + b"x", "360 bytes, it has more"),
        (lambda b: b[:3] + b"\x01" + b[4:], "not an IDX file"),
        (lambda b: b[:2] + b"\x0d" + b[3:], "not an IDX file"),
        (lambda b: b[:10], "not an IDX file"),
        (lambda b: b[:4] + struct.pack(">I", 2**32 - 1) + b[8:], "its header says [4294967295"),
        (lambda b: b[:4] + struct.pack(">3I", 10**7, 4096, 4096) + b[16:], "it has 360"),
        (lambda b: b[:4] + struct.pack(">3I", 6, 10, 6) + b[16:], "6 images and 12 labels"),
    ],
)
def test_a_spoilt_idx_file_is_told_apart(tmp_path: Path, spoil: object, why: str) -> None:
    write_mnist(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    assert callable(spoil)
    file.write_bytes(spoil(file.read_bytes()))
    error = refused(f"mnist:{tmp_path}")
    assert error.code == "FL-D102"
    assert why in error.message


def test_a_truncated_gz_is_malformed(tmp_path: Path) -> None:
    write_mnist(tmp_path, zipped=True)
    file = tmp_path / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-9])
    assert refused(f"mnist:{tmp_path}").code == "FL-D102"


def test_a_missing_mnist_file_is_named(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    error = refused(f"mnist:{tmp_path}")
    assert error.code == "FL-D101"
    assert "t10k-labels-idx1-ubyte" in error.message


@pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason="the real MNIST is not here")
def test_the_real_mnist_has_the_known_sizes_and_statistics() -> None:
    data = load_data(f"mnist:{REAL / 'mnist'}")
    assert isinstance(data.train, Split)
    assert isinstance(data.test, Split)
    assert (len(data.train), len(data.test)) == (60000, 10000)
    x = data.train.take(np.arange(0, 60000, 7)).x
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1) < 0.02


# ---- CIFAR-10 ------------------------------------------------------------------------------


def write_cifar(folder: Path, records: int = 4) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    content = rng.integers(0, 256, (records, 3073), dtype=np.uint8)
    content[:, 0] = np.arange(records) % 10
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        (folder / f"{name}.bin").write_bytes(content.tobytes())
    return content


def test_cifar_batches_are_joined_in_order(tmp_path: Path) -> None:
    content = write_cifar(tmp_path)
    data = load_data(f"cifar10:{tmp_path}")
    assert isinstance(data.train, Split)
    assert data.info == DataInfo((3, 32, 32), 10)
    assert data.train.y.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    expected = (content[1, 1:].reshape(3, 32, 32) / 255.0 - 0.5) / 0.5
    np.testing.assert_allclose(data.train.x[5].numpy(), expected, atol=1e-6)


def test_the_pickled_cifar_is_never_read_and_the_binary_named(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x02}q\x00.")
    error = refused(f"cifar10:{tmp_path}")
    assert error.code == "FL-D101"
    assert "only the pickled python version" in error.message
    assert "cifar-10-binary.tar.gz" in error.hint


@pytest.mark.parametrize("content", [b"", b"\0" * 3072, b"\x0a" + b"\0" * 3072])
def test_a_cifar_file_that_is_no_records_is_malformed(tmp_path: Path, content: bytes) -> None:
    write_cifar(tmp_path)
    (tmp_path / "data_batch_2.bin").write_bytes(content)
    assert refused(f"cifar10:{tmp_path}").code == "FL-D102"


# ---- text ----------------------------------------------------------------------------------


def test_text_is_windows_of_characters_and_the_next_ones(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    content = "grüße " * 40  # 240 characters, 216 to train
    file.write_text(content, encoding="utf-8")
    data = load_data(f"text:{file},context=5")
    assert isinstance(data.train, Split)
    assert isinstance(data.test, Split)
    words = data.info.vocabulary
    assert words == "".join(sorted(set(content)))
    assert data.info == DataInfo((5,), len(words), "text", words)
    assert "".join(words[i] for i in data.train.x.flatten().tolist()) == content[:215]
    assert "".join(words[i] for i in data.train.y.flatten().tolist()) == content[1:216]
    assert "".join(words[i] for i in data.test.x[0].tolist()) == content[216:221]


def test_topics_are_there_without_a_file_in_letters_that_no_version_of_python_changes() -> None:
    data = load_data("topics:context=32")
    assert isinstance(data.train, Split)
    assert isinstance(data.test, Split)
    assert data.info.shape == (32,)
    assert data.info.vocabulary == ALPHABET
    assert len(set(ALPHABET)) == data.info.classes == 96
    first = "".join(ALPHABET[i] for i in data.train.raw[:20].flatten().tolist())
    assert first[:300] in library_text()
    assert library_text().startswith('The "assert" statement')
    assert len(data.train) > 8 * len(data.test) > 8000
    assert refused("topics:contex=3").code == "FL-D103"
    assert refused("topics:context=60000").code == "FL-D105"


def test_text_that_is_short_or_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("abc" * 10)
    (tmp_path / "bytes").write_bytes(b"ab\xff")
    assert refused(f"text:{tmp_path / 'short'}").code == "FL-D105"
    error = refused(f"text:{tmp_path / 'bytes'}")
    assert (error.code, "byte 2" in error.message) == ("FL-D102", True)


# ---- npz -----------------------------------------------------------------------------------


def test_npz_with_a_split_of_its_own_is_taken_as_it_is(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float64).reshape(6, 2)
    y = np.array([0, 1, 2, 0, 1, 2])
    np.savez(tmp_path / "a.npz", x_train=x[:4], y_train=y[:4], x_test=x[4:], y_test=y[4:])
    data = load_data(f"npz:{tmp_path / 'a.npz'}")
    assert isinstance(data.train, Split)
    assert data.info == DataInfo((2,), 3)
    assert data.train.x.tolist() == x[:4].tolist()


def test_npz_of_x_and_y_is_split_and_bytes_are_pictures(tmp_path: Path) -> None:
    x = np.full((20, 1, 2, 2), 255, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.linspace(0, 1, 20, dtype=np.float32))
    data = load_data(f"npz:{tmp_path / 'a.npz'}")
    assert isinstance(data.train, Split)
    assert isinstance(data.test, Split)
    assert data.info == DataInfo((1, 2, 2), 1, "regression")
    assert (len(data.train), len(data.test)) == (16, 4)
    np.testing.assert_allclose(data.train.x.numpy(), 1, atol=1e-6)


def test_an_npz_with_other_arrays_says_which_are_wanted(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", foo=np.zeros(3))
    with pytest.raises(DataError, match="it holds foo") as caught:
        load_data(f"npz:{tmp_path / 'a.npz'}")
    assert "arrays x and y" in caught.value.hint


def test_an_npz_with_a_class_beyond_all_reason_is_refused(tmp_path: Path) -> None:
    """A model has an output for each: this one took 256 GB."""
    np.savez(tmp_path / "a.npz", x=np.zeros((60, 2)), y=np.array([0, 10**9] * 30))
    with pytest.raises(DataError, match="class 1000000000: they are numbered from 0"):
        load_data(f"npz:{tmp_path / 'a.npz'}")


def test_npz_of_classes_is_split_within_each(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((60, 2)), y=np.array([0] * 50 + [1] * 10))
    data = load_data(f"npz:{tmp_path / 'a.npz'}")
    assert isinstance(data.test, Split)
    assert torch.bincount(data.test.y).tolist() == [10, 2]


@pytest.mark.parametrize(
    "arrays",
    [
        {"z": np.zeros(3)},
        {"x": np.zeros((3, 2)), "y": np.zeros(4)},
        {"x": np.zeros(3), "y": np.zeros(3)},
        {"x": np.full((9, 2), np.nan), "y": np.zeros(9)},
        {"x": np.zeros((9, 2)), "y": np.full(9, -1)},
        {"x": np.zeros((9, 2)), "y": np.array(["a"] * 9)},
        {"x": np.array([{}, {}]), "y": np.zeros(2)},  # objects are pickles
    ],
)
def test_npz_that_cannot_be_used_is_malformed(
    tmp_path: Path, arrays: dict[str, npt.NDArray[np.generic]]
) -> None:
    np.savez(tmp_path / "a.npz", allow_pickle=True, **arrays)
    assert refused(f"npz:{tmp_path / 'a.npz'}").code == "FL-D102"


@pytest.mark.parametrize("kind", ["i8", "f4", "u1"])
@pytest.mark.parametrize("n", [0, 1])
def test_npz_of_next_to_nothing_is_too_little(tmp_path: Path, n: int, kind: str) -> None:
    """Of no example at all it was an unexpected error: "need at least one array"."""
    np.savez(tmp_path / "a.npz", x=np.zeros((n, 3)), y=np.zeros(n, kind))
    assert refused(f"npz:{tmp_path / 'a.npz'}").code == "FL-D105"


def test_npz_of_one_class_is_learned(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((10, 3)), y=np.zeros(10, np.int64))
    assert load_data(f"npz:{tmp_path / 'a.npz'}").info == DataInfo((3,), 1)


def test_a_file_that_is_no_archive_is_malformed(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 no zip")
    (tmp_path / "b.npz").write_bytes(b"\x80\x04}.")  # a pickle
    np.save(tmp_path / "c.npy", np.zeros(3))  # one array, no archive
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00 cut")
    for name in ("a.npz", "b.npz", "c.npy", "d.npz"):
        assert refused(f"npz:{tmp_path / name}").code == "FL-D102", name


# ---- synthetic, specs ----------------------------------------------------------------------


def test_synthetic_data_is_what_its_options_say() -> None:
    data = load_data("synthetic:examples=100,features=7,classes=4,seed=3")
    assert isinstance(data.train, Split)
    assert data.info == DataInfo((7,), 4)
    assert torch.bincount(data.train.y).tolist() == [20, 20, 20, 20]


@pytest.mark.parametrize(
    ("spec", "code", "hint"),
    [
        ("digit", "FL-D103", "did you mean 'digits'?"),
        ("minst:/data/mnist", "FL-D103", "did you mean 'mnist'?"),
        ("digits,size=3", "FL-D103", "known:"),
        ("digits:/data", "FL-D103", "write --data digits"),
        ("mnist", "FL-D101", "write mnist:DIR"),
        ("mnist:/no/such/folder", "FL-D101", "check the path"),
        ("text:/no/such/file", "FL-D101", "check the path"),
        ("csv:", "FL-D101", "write csv:FILE"),
        ("synthetic:examples=few", "FL-D103", "examples=N"),
        ("synthetic:sizes=3", "FL-D103", "its options: examples"),
    ],
)
def test_a_spec_that_names_nothing_says_what_would(spec: str, code: str, hint: str) -> None:
    error = refused(spec)
    assert error.code == code
    assert hint in error.hint


@pytest.mark.parametrize("path", ["n" * 5000, "a\0b"], ids=["long", "nul"])
def test_a_path_that_can_never_be_is_not_there(path: str) -> None:
    """It was an unexpected error, with the whole of it."""
    error = refused(f"npz:{path}")
    assert error.code == "FL-D101"
    assert len(error.message) < 300
    with pytest.raises(DataError):
        find_data(f"npz:{path}")


def test_a_path_may_have_commas(tmp_path: Path) -> None:
    folder = tmp_path / "a, b"
    folder.mkdir()
    (folder / "t.txt").write_text("hello world " * 30)
    assert load_data(f"text:{folder / 't.txt'},context=8").info.shape == (8,)


def test_a_user_s_module_that_is_not_there_is_a_usage_error() -> None:
    with pytest.raises(UsageError) as caught:
        load_data("no_such_module_here:load")
    assert caught.value.code == "FL-S103"


# ---- a user's own --------------------------------------------------------------------------


class Pairs(Dataset[tuple[Tensor, int]]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, at: int) -> tuple[Tensor, int]:
        return torch.full((3,), float(at)), at % 4


def test_one_dataset_is_split_and_its_shape_and_classes_found() -> None:
    data = from_user(Pairs(20), "m:o", seed=0)
    assert data.info == DataInfo((3,), 4)
    assert not isinstance(data.train, Split)
    assert sorted(data.labels().tolist()) == sorted(i % 4 for i in range(20) if i in kept(data))
    assert len(kept(data)) == 16


def kept(data: Data) -> set[int]:
    assert not isinstance(data.train, Split)
    return {int(data.train[i][0][0]) for i in range(16)}


def test_a_pair_of_tensor_datasets_becomes_tensors() -> None:
    x, y = torch.randn(10, 2), torch.arange(10) % 2
    data = from_user((TensorDataset(x, y), TensorDataset(x, y)), "m:o", seed=0)
    assert isinstance(data.train, Split)
    assert torch.equal(data.train.x, x)
    assert data.info == DataInfo((2,), 2)


def test_a_shard_of_a_dataset_holds_the_examples_asked_for() -> None:
    data = from_user((Pairs(8), Pairs(2)), "m:o", seed=0)
    shard = data.shard(np.array([1, 5]))
    assert not isinstance(shard, Split)
    assert [int(shard[i][0][0]) for i in range(2)] == [1, 5]


@pytest.mark.parametrize(("found", "code"), [(3, "FL-D103"), ((Pairs(0), Pairs(1)), "FL-D105")])
def test_what_is_no_data_is_refused(found: object, code: str) -> None:
    with pytest.raises(DataError) as caught:
        from_user(found, "m:o", seed=0)
    assert caught.value.code == code


def test_a_dataset_that_raises_is_told_as_the_users() -> None:
    """It was told as a bug of ours, with a crash file to report."""

    class Broken(Pairs):
        def __getitem__(self, at: int) -> tuple[Tensor, int]:
            raise KeyError("image")

    with pytest.raises(UsageError) as caught:
        from_user(Broken(9), "mine:Broken", 0)
    assert caught.value.code == "FL-S103"
    assert caught.value.message == "data 'mine:Broken' fails when it is read: KeyError: 'image'"


def test_an_option_that_a_source_has_not_is_told_with_what_to_write() -> None:
    """`digits:take=`, of proxy data, was answered with "it has none"."""
    with pytest.raises(DataError, match="digits has no option 'take'") as refused:
        load_data("digits:take=")
    assert refused.value.hint == "leave take out: digits has no options"
    with pytest.raises(DataError, match="text has no option 'take'") as refused:
        load_data("text:a.txt,take=3")
    assert refused.value.hint == "leave take out; its options: context"
