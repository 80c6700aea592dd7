"""The built-in sources of data: digits, MNIST, CIFAR-10, text, .npz files and made-up blobs.

Every file is read strictly: its header must account for each of its bytes before anything of the
size it claims is allocated, and no format that can run code (pickle) is read at all.
"""

import gzip
import importlib.util
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from atoll.client.data import Data, DataInfo, Split, holdout, is_there
from atoll.protocols.errors import DataError
from atoll.protocols.places import shown

Options = dict[str, str]
Array = npt.NDArray[Any]

MAX_IMAGES = 10_000_000
MAX_SIDE = 4096
MAX_CLASSES = 1 << 20  # of an npz: a model has an output for each
CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then red, green and blue rows
DIGITS = {"mean": 0.3053, "std": 0.3761, "scale": 1 / 16}  # measured on all pixels
MNIST = {"mean": 0.1307, "std": 0.3081, "scale": 1 / 255}
CIFAR = {"mean": 0.5, "std": 0.5, "scale": 1 / 255}


def digits(path: str, options: Options, seed: int) -> Data:
    """1,797 pictures of 8x8 that come with scikit-learn, pixels / 16; 80/20 within each class."""
    take_options("digits", options, ())
    if path:
        raise DataError("FL-D103", f"digits takes no path, got {path!r}", "write --data digits")
    spec = importlib.util.find_spec("sklearn")  # found, not imported: its import takes a second
    if spec is None or not spec.submodule_search_locations:
        raise DataError("FL-D101", "digits come with scikit-learn", "pip install scikit-learn")
    file = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(existing(file), "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)  # (1797, 65)
    x, y = table[:, :-1].reshape(-1, 1, 8, 8), table[:, -1].astype(np.int64)
    train, test = holdout(len(y), seed, labels=y)
    whole = Split(torch.from_numpy(x.copy()), torch.from_numpy(y), **DIGITS)
    return Data(DataInfo((1, 8, 8), 10), whole.take(train), whole.take(test))


def mnist(path: str, options: Options, seed: int) -> Data:
    """MNIST or Fashion-MNIST: four IDX files, plain or .gz, in one folder."""
    take_options("mnist", options, ())
    folder = existing_folder("mnist", path)
    splits = []
    for part in ("train", "t10k"):
        x = read_idx(_idx(folder, f"{part}-images", "idx3"), dims=3)
        y = read_idx(_idx(folder, f"{part}-labels", "idx1"), dims=1)
        if len(x) != len(y):
            raise _malformed(folder, f"{part} has {len(x)} images and {len(y)} labels")
        splits.append(
            Split(torch.from_numpy(x[:, None]), torch.from_numpy(y.astype(np.int64)), **MNIST)
        )
    train, test = splits
    classes = int(train.y.max()) + 1
    if train.raw.shape[1:] != test.raw.shape[1:] or int(test.y.max()) >= classes:
        raise _malformed(folder, "the test images are of another kind than the training images")
    return Data(DataInfo(tuple(train.raw.shape[1:]), classes), train, test)


def cifar10(path: str, options: Options, seed: int) -> Data:
    """CIFAR-10's binary version: data_batch_*.bin and test_batch.bin."""
    take_options("cifar10", options, ())
    folder = existing_folder("cifar10", path)
    if (folder / "cifar-10-batches-bin").is_dir():
        folder = folder / "cifar-10-batches-bin"
    batches = sorted(folder.glob("data_batch_*.bin"))
    if not batches or not (folder / "test_batch.bin").is_file():
        pickled = (folder / "data_batch_1").exists() or (folder / "cifar-10-batches-py").exists()
        raise DataError(
            "FL-D101",
            f"no data_batch_*.bin and test_batch.bin in {folder}"
            + (": only the pickled python version is there" if pickled else ""),
            "unpack cifar-10-binary.tar.gz there (pickles can run code and are never read)",
        )
    return Data(DataInfo((3, 32, 32), 10), _cifar(*batches), _cifar(folder / "test_batch.bin"))


def text(path: str, options: Options, seed: int) -> Data:
    """A UTF-8 file as characters: the first 90 % to train, the rest to test, in windows."""
    context = whole("text", take_options("text", options, ("context",)), "context", 64, least=2)
    file = existing_file("text", path)
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _malformed(file, f"not UTF-8 at byte {error.start}") from error
    codes, tokens = np.unique(
        np.frombuffer(content.encode("utf-32-le"), "<u4"), return_inverse=True
    )
    vocabulary = "".join(map(chr, codes))
    return windowed(str(file), torch.from_numpy(tokens.astype(np.int64)), vocabulary, context)


def windowed(source: str, tokens: torch.Tensor, vocabulary: str, context: int) -> Data:
    """The first 90 % to train, the rest to test, in windows end to end. DataError FL-D105."""
    cut = len(tokens) * 9 // 10
    if min(cut, len(tokens) - cut) <= context:
        raise DataError(
            "FL-D105",
            f"{source} has {len(tokens)} characters, windows of {context} need {11 * context}",
            "give a longer file or a smaller context",
        )
    info = DataInfo((context,), len(vocabulary), "text", vocabulary)
    return Data(info, _windows(tokens[:cut], context), _windows(tokens[cut:], context))


def npz(path: str, options: Options, seed: int) -> Data:
    """Arrays x_train, y_train, x_test, y_test, or x and y, which are split 80/20."""
    take_options("npz", options, ())
    file = existing_file("npz", path)
    if not zipfile.is_zipfile(file):
        raise _malformed(file, "not an archive of arrays")
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        raise _malformed(file, str(error)) from error
    if {"x_train", "y_train", "x_test", "y_test"} <= set(arrays):
        train = _arrays(file, arrays["x_train"], arrays["y_train"])
        test = _arrays(file, arrays["x_test"], arrays["y_test"])
    elif {"x", "y"} <= set(arrays):
        both = _arrays(file, arrays["x"], arrays["y"])
        labels = None if both.y.is_floating_point() else both.y.numpy()
        kept, held = holdout(len(both), seed, labels=labels)
        train, test = both.take(kept), both.take(held)
    else:
        raise DataError(
            "FL-D102",
            f"{file}: it holds {', '.join(sorted(arrays)) or 'nothing'}",
            "save arrays x and y in it, or x_train, y_train, x_test and y_test",
        )
    if min(len(train), len(test)) < 1:
        raise DataError("FL-D105", f"{file} leaves no examples to train or to test", "give more")
    if train.raw.shape[1:] != test.raw.shape[1:] or train.y.dtype != test.y.dtype:
        raise _malformed(file, "train and test differ in shape or kind")
    shape = tuple(train.raw.shape[1:])
    if train.y.is_floating_point():
        return Data(DataInfo(shape, 1, "regression"), train, test)
    return Data(DataInfo(shape, int(max(train.y.max(), test.y.max())) + 1), train, test)


def synthetic(path: str, options: Options, seed: int) -> Data:
    """Gaussian blobs, one a class, centres at distance about 3: quick to make, easy to learn."""
    names = ("examples", "features", "classes", "seed")
    options = take_options("synthetic", options, names)
    n = whole("synthetic", options, "examples", 2000, least=10)
    features = whole("synthetic", options, "features", 20, least=1)
    classes = whole("synthetic", options, "classes", 10, least=2)
    rng = np.random.default_rng(whole("synthetic", options, "seed", seed, least=0))
    y = np.arange(n) % classes
    centres = rng.normal(size=(classes, features)) * (3 / np.sqrt(2 * features))
    x = (centres[y] + rng.normal(size=(n, features)) * 0.5).astype(np.float32)
    train, test = holdout(n, seed, labels=y)
    both = Split(torch.from_numpy(x), torch.from_numpy(y))
    return Data(DataInfo((features,), classes), both.take(train), both.take(test))


# ---- shared by the sources ----------------------------------------------------------------


def take_options(source: str, options: Options, known: tuple[str, ...]) -> Options:
    """`options`, all of them `known`; else FL-D103."""
    for name in options:
        if name not in known:
            raise DataError(
                "FL-D103",
                f"{source} has no option {name!r}",
                f"leave {name} out; its options: {', '.join(known)}"
                if known
                else f"leave {name} out: {source} has no options",
            )
    return options


def whole(source: str, options: Mapping[str, str], name: str, default: int, least: int) -> int:
    """Option `name` as a whole number of at least `least`; else FL-D103."""
    value = options.get(name, str(default))
    if not value.isdecimal() or int(value) < least:
        raise DataError(
            "FL-D103", f"{source}: {name}={value!r}", f"write {name}=N with N of at least {least}"
        )
    return int(value)


def existing(path: Path) -> Path:
    if not is_there(path):
        raise DataError("FL-D101", f"{shown(str(path), 255)} does not exist", "check the path")
    return path


def existing_file(source: str, path: str) -> Path:
    if not path:
        raise DataError("FL-D101", f"{source} needs a file", f"write {source}:FILE")
    if not existing(Path(path).expanduser()).is_file():
        raise DataError("FL-D101", f"{path} is not a file", f"write {source}:FILE")
    return Path(path).expanduser()


def existing_folder(source: str, path: str) -> Path:
    if not path:
        raise DataError("FL-D101", f"{source} needs a folder", f"write {source}:DIR")
    if not existing(Path(path).expanduser()).is_dir():
        raise DataError("FL-D101", f"{path} is not a folder", f"write {source}:DIR")
    return Path(path).expanduser()


def read_idx(file: Path, dims: int) -> Array:
    """The unsigned bytes of an IDX file of so many dimensions, shape as its header says.

    The header is checked against bounds first, then just so many bytes are read, and none may
    follow: FL-D102 otherwise.
    """
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            return _idx_array(file, stream, dims)  # type: ignore[arg-type]
    except (OSError, EOFError, zlib.error) as error:
        raise _malformed(file, str(error)) from error


def _idx_array(file: Path, stream: BinaryIO, dims: int) -> Array:
    header = stream.read(4 + 4 * dims)
    if len(header) < 4 + 4 * dims or header[:4] != bytes([0, 0, 8, dims]):
        raise _malformed(file, f"not an IDX file of bytes in {dims} dimensions")
    shape = [int(n) for n in np.frombuffer(header, ">u4", offset=4)]
    if not 1 <= shape[0] <= MAX_IMAGES or any(not 1 <= side <= MAX_SIDE for side in shape[1:]):
        raise _malformed(file, f"its header says {shape}")
    size = int(np.prod(shape, dtype=object))
    content = _read_up_to(stream, size + 1)
    if len(content) != size:
        more = "more" if len(content) > size else len(content)
        raise _malformed(file, f"its header says {size} bytes, it has {more}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read_up_to(stream: BinaryIO, size: int) -> bytearray:
    """At most `size` bytes, in pieces: a header that lies about terabytes allocates nothing."""
    content = bytearray()
    while len(content) < size and (piece := stream.read(min(1 << 22, size - len(content)))):
        content += piece
    return content


def _idx(folder: Path, stem: str, kind: str) -> Path:
    names = [f"{stem}-{kind}-ubyte", f"{stem}.{kind}-ubyte"]
    for name in [*names, *(f"{name}.gz" for name in names)]:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        "FL-D101",
        f"no {names[0]} or {names[0]}.gz in {folder}",
        "download the four IDX files there",
    )


def _cifar(*files: Path) -> Split:
    parts = []
    for file in files:
        size = file.stat().st_size
        if size == 0 or size % CIFAR_RECORD or size // CIFAR_RECORD > MAX_IMAGES:
            raise _malformed(file, f"{size} bytes are not records of {CIFAR_RECORD}")
        parts.append(np.fromfile(file, np.uint8).reshape(-1, CIFAR_RECORD))
        if parts[-1][:, 0].max() > 9:
            raise _malformed(file, f"label {parts[-1][:, 0].max()} is not one of 0 to 9")
    records = np.concatenate(parts)
    x = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy())
    return Split(x, torch.from_numpy(records[:, 0].astype(np.int64)), **CIFAR)


def _windows(tokens: torch.Tensor, context: int) -> Split:
    """Windows end to end; y is x moved by one character."""
    n = (len(tokens) - 1) // context
    x = tokens[: n * context].view(n, context)
    return Split(x, tokens[1 : n * context + 1].view(n, context))


def _arrays(file: Path, x: Array, y: Array) -> Split:
    if x.ndim < 2 or y.ndim != 1 or len(x) != len(y):
        raise _malformed(file, f"x is {x.shape} and y is {y.shape}, wanted (n, ...) and (n,)")
    if x.dtype.kind not in "buif" or y.dtype.kind not in "buif":
        raise _malformed(file, f"x of {x.dtype} and y of {y.dtype} are not numbers")
    scale = 1 / 255 if x.dtype == np.uint8 else 1.0
    if x.dtype != np.uint8:
        x = x.astype(np.float32)
    y = y.astype(np.float32 if y.dtype.kind == "f" else np.int64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise _malformed(file, "it holds values that are not numbers")
    if y.dtype == np.int64 and len(y) and int(y.min()) < 0:
        raise _malformed(file, f"class {int(y.min())} is negative")
    if y.dtype == np.int64 and len(y) and int(y.max()) >= MAX_CLASSES:
        raise _malformed(file, f"class {int(y.max())}: they are numbered from 0")
    return Split(torch.from_numpy(x), torch.from_numpy(y), scale=scale)


def _malformed(file: Path, what: str) -> DataError:
    return DataError("FL-D102", f"{file}: {what}", "get the file again, or write it anew")
