"""CSV files: features from columns, targets of each kind, and rows that do not fit."""

from pathlib import Path

import numpy as np
import pytest

from atoll.client.data import Data, Split, load_data
from atoll.client.partition import shard_of
from atoll.protocols.errors import DataError
from tests.conftest import Logged

ROWS = 40


def write(folder: Path) -> Path:
    """age (number, one empty cell), town (category), clinic (site), ill (yes or no)."""
    lines = ["age,town,clinic,ill"]
    for i in range(ROWS):
        age = "" if i == 7 else str(20 + i)
        lines.append(
            f"{age},{['z', 'x', 'y'][i % 3]},{'north' if i < 30 else 'south'},{'ny'[i % 2]}"
        )
    file = folder / "t.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


def splits(data: Data) -> tuple[Split, Split]:
    assert isinstance(data.train, Split)
    assert isinstance(data.test, Split)
    return data.train, data.test


def test_numbers_are_standardised_by_the_training_rows_and_words_one_hot(tmp_path: Path) -> None:
    data = load_data(f"csv:{write(tmp_path)},target=ill,site=clinic")
    train, test = splits(data)
    assert data.info.shape == (4,)  # age and three towns; the site is no feature
    assert (data.info.classes, data.info.kind) == (2, "classification")
    assert (len(train), len(test)) == (32, 8)
    ages = np.array([float(a) if a else np.nan for a in data.columns["age"]])
    ages = np.where(np.isnan(ages), np.nanmean(ages), ages)
    known = np.array([float(a) for a in data.columns["age"] if a])
    expected = (ages - known.mean()) / known.std()
    np.testing.assert_allclose(train.x[:, 0].numpy(), expected, atol=1e-5)
    towns = ["xyz".index(t) for t in data.columns["town"]]
    assert train.x[:, 1:].argmax(1).tolist() == towns
    assert train.x[:, 1:].sum(1).tolist() == [1.0] * 32
    assert train.y.tolist() == ["ny".index(v) for v in data.columns["ill"]]


def test_a_category_never_trained_on_is_all_zeros(tmp_path: Path) -> None:
    file = tmp_path / "u.csv"
    file.write_text("a,b\n" + "".join(f"v{i},{'no' if i % 2 else 'yes'}\n" for i in range(10)))
    train, test = splits(load_data(f"csv:{file}"))
    assert train.x.sum(1).tolist() == [1.0] * 8
    assert test.x.tolist() == [[0.0] * 8] * 2


def test_the_last_column_is_the_target_unless_named(tmp_path: Path) -> None:
    data = load_data(f"csv:{write(tmp_path)}")
    assert data.info.shape == (6,)  # age, three towns, two clinics
    assert set(data.columns) == {"age", "town", "clinic", "ill"}


def test_clients_are_split_by_site(tmp_path: Path) -> None:
    data = load_data(f"csv:{write(tmp_path)},site=clinic")
    parts = [shard_of(data, "column:clinic", (i, 2), seed=0) for i in range(2)]
    assert [{data.columns["clinic"][i] for i in part} for part in parts] == [{"north"}, {"south"}]
    with pytest.raises(DataError) as caught:
        shard_of(data, "column:ward", (0, 2), seed=0)
    assert caught.value.code == "FL-D104"
    assert "age, clinic, ill, town" in caught.value.hint


def test_a_target_of_many_numbers_is_regression(tmp_path: Path) -> None:
    file = tmp_path / "r.csv"
    file.write_text("a,b\n" + "".join(f"{i},{i * 0.5}\n" for i in range(20)))
    data = load_data(f"csv:{file}")
    train, _ = splits(data)
    assert (data.info.kind, data.info.classes) == ("regression", 1)
    assert sorted(train.y.tolist()) == sorted(float(v) for v in data.columns["b"])
    assert load_data(f"csv:{file},target=a").info.kind == "regression"  # 20 values in 20 rows
    file.write_text("a,b\n" + "".join(f"{i},{i % 4 * 0.5}\n" for i in range(20)))
    assert load_data(f"csv:{file}").info.kind == "regression"  # halves are no classes
    assert load_data(f"csv:{file},task=classification").info.classes == 4


def test_a_target_of_few_whole_numbers_is_classes_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "c.csv"
    file.write_text("a,b\n" + "".join(f"{i},{[10, 9, 2][i % 3]}\n" for i in range(30)))
    data = load_data(f"csv:{file}")
    train, _ = splits(data)
    assert data.info.classes == 3
    assert train.y.tolist() == [[2, 9, 10].index(int(v)) for v in data.columns["b"]]


@pytest.mark.parametrize(
    ("text", "options", "code", "why"),
    [
        ("a,b\n1,2\n3\n", "", "FL-D102", "line 3 has 1 cells, not 2"),
        ("a,a\n1,2\n", "", "FL-D102", "no header of distinct names"),
        ("", "", "FL-D105", "no rows"),
        ("a,b\n", "", "FL-D105", "no rows"),
        ("a,b\n1,x\n2,\n", "", "FL-D102", "row 2 has no 'b'"),
        ("a,b\n1,x\n2,x\n", "", "FL-D102", "always 'x'"),
        ("a,b\n1,x\n2,y\n", "", "FL-D105", "2 rows"),
        ("a,b\n1,x\n", "", "FL-D105", "1 row"),
        ("a,b\n1,x\n2,y\n", ",target=c", "FL-D102", "no column 'c'"),
        ("a,b\n1,x\n2,y\n", ",task=sorting", "FL-D103", "task='sorting'"),
        ("a,b\n1,x\n2,y\n", ",task=regression", "FL-D102", "not numbers"),
        ("b\n" + "x\ny\n" * 10, "", "FL-D102", "no column beside the target"),
        ("a;b\n" + "1;2\n" * 10, "", "FL-D102", "no column beside the target"),
        ('a,b\n"1,x\n', "", "FL-D102", "unexpected end of data"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(
    tmp_path: Path, text: str, options: str, code: str, why: str
) -> None:
    file = tmp_path / "t.csv"
    file.write_text(text)
    with pytest.raises(DataError) as caught:
        load_data(f"csv:{file}{options}")
    assert caught.value.code == code
    assert why in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_table_whose_cells_no_comma_separates_is_told_so(tmp_path: Path, mark: str) -> None:
    """It had too few rows, whatever it had."""
    file = tmp_path / "t.csv"
    file.write_text(f"age{mark}ill\n" + f"50{mark}yes\n" * 50)
    with pytest.raises(DataError) as caught:
        load_data(f"csv:{file}")
    assert caught.value.hint == f"separate cells by commas: its one column is {f'age{mark}ill'!r}"


def table_of(tmp_path: Path, *cells: str) -> str:
    rows = [f"{cell},{i % 2}" for i, cell in enumerate([*cells, *map(str, range(20))])]
    (tmp_path / "t.csv").write_text("bp,ill\n" + "\n".join(rows) + "\n")
    return f"csv:{tmp_path / 't.csv'}"


def test_numbers_among_which_one_is_none_are_told_as_categories(
    tmp_path: Path, logged: Logged
) -> None:
    """One damaged cell made fifty inputs of one, and nobody said so."""
    assert load_data(table_of(tmp_path, "1", "inf")).info.shape > (10,)
    assert "column 'bp' becomes" in logged.text
    assert "row 2 has 'inf', which is no number" in logged.text


@pytest.mark.parametrize("cell", ["", "N/A", "NULL", "None"])
def test_what_others_write_for_a_missing_number_is_one(
    tmp_path: Path, logged: Logged, cell: str
) -> None:
    assert load_data(table_of(tmp_path, cell)).info.shape == (1,)
    assert not logged.text


def test_words_with_a_few_numbers_among_them_are_categories(tmp_path: Path, logged: Logged) -> None:
    load_data(table_of(tmp_path, *(f"ward {n % 3}" for n in range(30))))
    assert not logged.text


def test_a_class_may_be_called_as_a_missing_number_is(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n" + "1,None\n2,mild\n" * 10)
    assert load_data(f"csv:{tmp_path / 't.csv'}").info.classes == 2
