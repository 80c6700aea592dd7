"""Tables: a CSV file with a header as numbers to train on.

Columns of numbers are standardised by the training rows, others one-hot by their sorted values; an
empty cell of a number column takes its mean. All raw columns are kept, to split clients by.
"""

import csv
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from atoll.client.data import Data, DataInfo, Indices, Kind, Split, holdout
from atoll.client.sources import Options, existing_file, take_options
from atoll.protocols.errors import DataError

logger = logging.getLogger(__name__)

MAX_CATEGORIES = 1000  # one-hot columns a column may become: more is an identifier, not a feature
MAX_CLASSES = 100  # distinct whole numbers up to which a target is classes
EMPTY = ("", "NA", "NaN", "nan", "?")
MISSING = (*EMPTY, "N/A", "NULL", "null", "None")  # among numbers; a class may be called so

Column = Sequence[str]


def table(path: str, options: Options, seed: int) -> Data:
    """`csv:FILE,target=NAME,site=NAME`: the target is the last column unless named.

    `site` is kept out of the features. `task=classification` or `task=regression` overrules what
    the target looks like. 80/20, within each class where there are classes.
    """
    take_options("csv", options, ("target", "site", "task"))
    file = existing_file("csv", path)
    columns = _read(file)
    target = options.get("target", next(reversed(columns)))
    site = options.get("site", "")
    for name in (target, *([site] if site else [])):
        if name not in columns:
            raise DataError(
                "FL-D102", f"{file} has no column {name!r}", f"it has {', '.join(columns)}"
            )
    features = [name for name in columns if name not in (target, site)]
    if not features:
        one = len(columns) == 1 and any(mark in target for mark in ";\t|")
        hint = f"separate cells by commas: its one column is {target[:60]!r}" if one else "add one"
        raise DataError("FL-D102", f"{file} has no column beside the target", hint)
    y, classes, kind = _target(file, target, columns[target], options.get("task", ""))
    labels = y if kind == "classification" else None
    train, test = holdout(len(y), seed, labels=labels)
    if min(len(train), len(test)) < 1:
        raise _few(file, len(y))
    blocks = [_feature(file, name, columns[name], train) for name in features]
    x = np.concatenate(blocks, axis=1)
    both = Split(torch.from_numpy(x), torch.from_numpy(y))
    kept = {name: [values[i] for i in train] for name, values in columns.items()}
    info = DataInfo((x.shape[1],), classes, kind)
    return Data(info, both.take(train), both.take(test), kept)


def _read(file: Path) -> dict[str, Column]:
    """The columns by name, in order; FL-D102 with the line where a row does not fit the header."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = []
            for row in reader:
                if row and len(row) != len(header):
                    raise _malformed(
                        file, f"line {reader.line_num} has {len(row)} cells, not {len(header)}"
                    )
                if row:
                    rows.append([cell.strip() for cell in row])
    except (csv.Error, UnicodeDecodeError) as error:
        raise _malformed(file, str(error)) from error
    if len(set(header)) != len(header) or not all(header):
        raise _malformed(file, f"its first line is no header of distinct names: {header[:8]}")
    if not rows:
        raise DataError("FL-D105", f"{file} has no rows", "give a header and at least 5 rows")
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def _target(file: Path, name: str, values: Column, task: str) -> tuple[npt.NDArray[Any], int, Kind]:
    """(values, outputs, kind): classes are numbered in sorted order."""
    if task not in ("", "classification", "regression"):
        raise DataError("FL-D103", f"csv: task={task!r}", "write classification or regression")
    if any(value in EMPTY for value in values):
        at = next(i for i, value in enumerate(values) if value in EMPTY)
        raise _malformed(file, f"row {at + 1} has no {name!r}, which is the target")
    numbers = _numbers(values)
    whole = numbers is not None and bool((numbers == np.round(numbers)).all())
    few = len(set(values)) <= min(MAX_CLASSES, max(2, len(values) // 2))
    if task == "regression" or (not task and numbers is not None and not (whole and few)):
        if numbers is None:
            raise _malformed(file, f"target {name!r} is not numbers", "use task=classification")
        return numbers.astype(np.float32), 1, "regression"
    keyed = values if numbers is None else numbers
    classes, places = np.unique(np.asarray(keyed), return_inverse=True)
    if len(values) < 2:
        raise _few(file, len(values))
    if len(classes) < 2:
        raise _malformed(file, f"target {name!r} is always {values[0]!r}")
    return places.astype(np.int64), len(classes), "classification"


def _feature(file: Path, name: str, values: Column, train: Indices) -> npt.NDArray[np.float32]:
    """(rows, 1) standardised, or (rows, categories) one-hot: a value never trained on is zeros."""
    numbers = _numbers(values, MISSING)
    if numbers is not None:
        seen = numbers[train]
        mean = float(np.nanmean(seen)) if not np.isnan(seen).all() else 0.0
        std = float(np.nanstd(seen)) if not np.isnan(seen).all() else 0.0
        scaled = (np.where(np.isnan(numbers), mean, numbers) - mean) / (std or 1.0)
        return scaled.astype(np.float32)[:, None]
    categories = sorted({values[i] for i in train})
    _doubt(file, name, values, len(categories))
    if len(categories) > MAX_CATEGORIES:
        raise _malformed(
            file,
            f"column {name!r} has {len(categories)} different values",
            f"drop it, or make at most {MAX_CATEGORIES} groups of them",
        )
    place = {value: i for i, value in enumerate(categories)}
    block = np.zeros((len(values), len(categories)), dtype=np.float32)
    for row, value in enumerate(values):
        if value in place:
            block[row, place[value]] = 1
    return block


def _numbers(values: Column, missing: Sequence[str] = EMPTY) -> npt.NDArray[np.float64] | None:
    """The values as numbers, a missing one as NaN; None where any is no finite number."""
    numbers = np.empty(len(values))
    for i, value in enumerate(values):
        try:
            numbers[i] = math.nan if value in missing else float(value)
        except ValueError:
            return None
        if value not in missing and not math.isfinite(numbers[i]):
            return None
    return numbers


def _doubt(file: Path, name: str, values: Column, categories: int) -> None:
    """Say so where most of a column that is taken as categories are numbers."""
    odd = [i for i, value in enumerate(values) if _numbers([value], MISSING) is None]
    if 2 * len(odd) < len(values):
        logger.warning(
            "%s: column %r becomes %d categories, for row %d has %r, which is no number (an empty "
            "cell, NA, NULL or ? is a missing one)", file, name, categories, odd[0] + 1,
            values[odd[0]],
        )  # fmt: skip


def _few(file: Path, rows: int) -> DataError:
    told = f"{file} has {rows} row{'s' * (rows != 1)}"
    return DataError("FL-D105", told, "give at least 5")


def _malformed(file: Path, what: str, hint: str = "mend the file") -> DataError:
    return DataError("FL-D102", f"{file}: {what}", hint)
