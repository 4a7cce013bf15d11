"""Tables of one's own: what is read from text and .npz files, what is held out, what is refused."""

import os
import pathlib

import numpy as np
import pytest

from fmjax import data
from fmjax.data import tables

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3))


def write(path, x=X, names="a,b,c", delimiter=","):
    lines = [delimiter.join(repr(float(cell)) for cell in row) for row in x]
    head = [names.replace(",", delimiter)] if names else []
    path.write_text("\n".join([*head, *lines]) + "\n")
    return path


def by_rows(x):
    return x[np.lexsort(x.T[::-1])]


def whole(path, **options):
    return data.load_table(path, "train+test", **options)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", " ", "  ", ", "])
@pytest.mark.parametrize("names", ["a,b,c", ""])
def test_text_is_read_to_the_last_bit(tmp_path, delimiter, names):
    table = whole(write(tmp_path / "t.csv", names=names, delimiter=delimiter))
    assert table.x.dtype == np.float64 and table.conditions is None
    assert table.names == (("a", "b", "c") if names else ("x_0", "x_1", "x_2"))
    np.testing.assert_array_equal(by_rows(table.x), by_rows(X))


def test_arrays_are_read_to_the_last_bit(tmp_path):
    np.savez(tmp_path / "one.npz", points=X)
    np.savez(tmp_path / "many.npz", a=X[:, 0], bc=X[:, 1:], k=np.arange(40, dtype=np.uint8))
    one, many = whole(tmp_path / "one.npz"), whole(tmp_path / "many.npz")
    assert one.names == ("points_0", "points_1", "points_2")
    assert many.names == ("a", "bc_0", "bc_1", "k")
    np.testing.assert_array_equal(by_rows(one.x), by_rows(X))
    np.testing.assert_array_equal(by_rows(many.x)[:, :3], by_rows(X))
    for row in many.x:
        np.testing.assert_array_equal(row[:3], X[int(row[3])])


def test_an_offset_of_1e9_keeps_its_noise(tmp_path):
    x = 1e9 + RNG.normal(size=(50, 1))
    write(tmp_path / "t.csv", x, "a")
    np.savez(tmp_path / "t.npz", a=x[:, 0])
    for file in ("t.csv", "t.npz"):
        np.testing.assert_array_equal(by_rows(whole(tmp_path / file).x), by_rows(x))


def test_text_as_other_programs_write_it(tmp_path):
    file = tmp_path / "t.csv"
    expected = [[1.0, -2.5], [5.0, 6.0], [3e2, 4.0]]
    for text in (
        "\ufeffa,b\r\n1,-2.5\r\n300,4\r\n5,6\r\n",  # Excel's
        '"a","b"\n"1","-2.5"\n3e2,4\n\n5,6',  # quotes, a blank line, no end of the last one
        "# a b\n1 -2.5\n 3.0E+02   4\n5 6\n",  # numpy.savetxt's
        "a;b\n1;-2.5\n300;4\n5;6\n",
    ):
        file.write_text(text, "utf-8", newline="")
        table = whole(file)
        assert table.names == ("a", "b")
        np.testing.assert_array_equal(by_rows(table.x), expected)
    file.write_text("#\n1 2\n3 4\n5 6\n")
    assert whole(file).x.shape == (3, 2)
    for mark, other in (",;", ";,"):  # the delimiter is the one that cuts lines alike
        lines = (f"a{other} b{mark}c", f"1{mark}2", f"3{mark}4", f"5{mark}6")
        file.write_text("\n".join(lines))
        assert whole(file).names == (f"a{other} b", "c")


def test_columns_and_conditions_are_chosen_by_name(tmp_path):
    file = write(tmp_path / "t.csv")
    table = whole(file, columns=["c", "a"], conditions=["b"])
    assert table.names == ("c", "a") and table.condition_names == ("b",)
    together = np.concatenate([table.x, table.conditions], axis=1)
    np.testing.assert_array_equal(by_rows(together), by_rows(X[:, [2, 0, 1]]))
    rest = whole(file, conditions=["b"])
    assert rest.names == ("a", "c")
    np.testing.assert_array_equal(rest.conditions, table.conditions)
    np.savez(tmp_path / "t.npz", theta=X[:, :2], y=X[:, 2:], other=np.zeros((7, 2, 2)))
    arrays = whole(tmp_path / "t.npz", columns=["theta"], conditions=["y_0"])
    assert arrays.names == ("theta_0", "theta_1") and arrays.condition_names == ("y_0",)
    together = np.concatenate([arrays.x, arrays.conditions], axis=1)
    np.testing.assert_array_equal(by_rows(together), by_rows(X))
    # What nobody asks for isn't checked: text, and a column without a name.
    (tmp_path / "u.csv").write_text(",who,a\n0,Ann,1\n1,Bob,2\n")
    assert sorted(data.load_table(tmp_path / "u.csv", columns=["a"]).x[:, 0]) == [1, 2]


def test_the_division_is_fixed_and_slices_are_of_one_order(tmp_path):
    file = write(tmp_path / "t.csv", np.arange(400.0)[:, None], "a")
    train, test, both = (
        data.load_table(file, split).x[:, 0] for split in ("train", "test", "train+test")
    )
    assert sorted([*train, *test]) == list(range(400)) and 20 < len(test) < 60
    np.testing.assert_array_equal(both, [*train, *test])
    np.testing.assert_array_equal(data.load_table(file, "train[:50]").x[:, 0], train[:50])
    assert abs(train[:50].mean() - 200) < 5 * (400 / 12**0.5) / 50**0.5  # no slice of a sorted file
    others = {tuple(data.load_table(file, "test", seed=seed).x[:, 0]) for seed in range(5)}
    assert len(others) == 5
    # Rows that come later leave the others where they are, and columns have no say.
    more = write(tmp_path / "more.csv", np.arange(500.0)[:, None] + [0, 7], "a,b")
    assert {*data.load_table(more, "test").x[:, 0]} & {*range(400)} == {*test}


def test_a_tenth_is_held_out():
    rows = tables.hold_out(20_000, seed=0)
    assert abs(len(rows["test"]) / 20_000 - 0.1) < 5 * (0.09 / 20_000) ** 0.5
    for num in range(2, 9):
        for seed in range(300):
            rows = tables.hold_out(num, seed)
            assert sorted([*rows["train"], *rows["test"]]) == list(range(num))
            assert len(rows["train"]) >= 2 and (num == 2) == (len(rows["test"]) == 0)


def test_arrays_train_and_test_are_the_splits(tmp_path):
    np.savez(tmp_path / "t.npz", train=X[:30], test=X[30:])
    train, test = (data.load_table(tmp_path / "t.npz", split) for split in ("train", "test"))
    np.testing.assert_array_equal(by_rows(train.x), by_rows(X[:30]))
    np.testing.assert_array_equal(by_rows(test.x), by_rows(X[30:]))
    assert train.names == test.names == ("x_0", "x_1", "x_2")
    given = data.load_table(tmp_path / "t.npz", "test", conditions=["x_1"])
    np.testing.assert_array_equal(by_rows(given.x), by_rows(X[30:, [0, 2]]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold rows of numbers; it is empty"),
        ("\n\n", "must hold rows of numbers; it is empty"),
        ("a,b\n", "two rows or more to train on; the file has 0"),
        ("a,b\n1,2\n", "two rows or more to train on; the file has 1"),
        ("a,b\n1,2\n3\n", "line 3: every line must have as many cells as the first, 2; got 1"),
        ("a,b\n\n1,2\n3,4,5\n", "line 4: every line .* 2; got 3"),
        ("a,b\n1,2\n3,x\n", "line 3, column 'b': cells must be numbers; got 'x'"),
        ("a,b\n1,2\n3,1_0\n", "line 3, column 'b': cells must be numbers; got '1_0'"),
        ("a;b\n1;2\n3;1,5\n", "line 3, column 'b': .* got '1,5'. Write a decimal point"),
        ("a,b\n1,2\n3,True\n", "line 3, column 'b': cells must be numbers; got 'True'"),
        ("a,b\n1,2\n3,\nNA,nan\n", "line 3, column 'b': cells must be finite .*first of 3"),
        ("a,b\n1,2\n-inf,2\n", "line 3, column 'a': .*got -inf, the first of 1"),
        ("a,b\n1,2\n5,1e400\n", "line 3, column 'b': .*got inf, the first of 1"),
        ("a,b\n1,2\n5,1e39\n", "line 3, column 'b': cells must be within float32.*1e.39.*first of"),
        ("a,b\n1,2\n3,2\n5,2\n", "column 'b': a column must vary .*all are 2"),
        ("a,b,c\n1,2,3\n4,2,3\n", "column 'b' and 1 more: a column must vary"),
        ("a,b,a\n1,2,3\n4,5,6\n", "different names; 'a' is that of columns 1 and 3. Rename"),
        ("a,2,c\n1,2,3\n4,5,6\n", "line 1: .*names or numbers; got 'a' in column 1 and '2' in col"),
        (",a\n1,2\n4,5\n", "must have names; column 1 has none"),
    ],
)
def test_text_that_is_no_table(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        data.load_table(tmp_path / "t.csv")
    assert "t.csv" in str(error.value) and "\n" not in str(error.value)


GOOD = np.arange(6.0).reshape(3, 2)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "must hold arrays; it is empty"),
        ({"a": GOOD[:0]}, "two rows or more to train on; the file has 0"),
        ({"a": np.float64(3)}, r"array a must be \[num\] or \[num, D\]; got \(\)"),
        ({"a": np.zeros((3, 2, 2))}, r"array a must be .*\(3, 2, 2\). Reshape it to \(3, -1\)"),
        ({"a": GOOD, "b": np.arange(4)}, "equally many rows; got a 3, b 4"),
        ({"a": GOOD + 1j}, "array a must be of real numbers; got complex128"),
        ({"a": GOOD > 2}, "array a must be of real numbers; got bool"),
        ({"a": GOOD, "who": np.array(["x", "y", "z"])}, "array who must be .*<U1. Number"),
        ({"a": np.array([{}, {}, {}])}, "array a must be of numbers; got Python objects"),
        ({"a": [[1, 2], [3, np.nan], [np.inf, 4]]}, "row 1, column 'a_1': .*nan, the first of 2"),
        ({"a": GOOD, "b": [1.0, 2.0, -1e39]}, "row 2, column 'b': cells must be within float32"),
        ({"a": X, "b": np.full(40, 0.1)}, "column 'b': a column must vary .*all are 0.1"),
        ({"train": GOOD}, "train and test must come together and alone; got train"),
        ({"train": GOOD, "test": GOOD, "val": GOOD}, "together and alone; got train, test, val"),
        ({"train": GOOD, "test": GOOD[:, :1]}, "the same columns; got 2 and 1"),
        ({"train": GOOD[:1], "test": GOOD}, "array train has 1"),
        ({"train": GOOD, "test": [[1, 2], [3, np.nan]]}, "array test, row 1, column 'x_1'"),
        ({"train": GOOD, "test": GOOD > 2}, "array test must be of real numbers; got bool"),
        ({"a": GOOD, "a_1": GOOD[:, 0]}, "different names; 'a_1' is that of columns 2 and 3"),
    ],
)
def test_arrays_that_are_no_table(tmp_path, arrays, message):
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        data.load_table(tmp_path / "t.npz")
    assert "t.npz" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ["a", "bb"]}, "columns must be of the columns a, b, c; got 'bb'. Did .* 'b'"),
        ({"conditions": ["x"]}, "conditions must be of the columns a, b, c; got 'x'"),
        ({"conditions": ["a", "b", "c"]}, "left to model; got all of them are conditions"),
        ({"columns": []}, "left to model; got none"),
        ({"columns": ["a", "b"], "conditions": ["b"]}, "got 'b' in `columns` and in `conditions`"),
        ({"columns": ["a", "a"]}, "columns must be different; got 'a' twice"),
        ({"columns": "ab"}, "columns must be a list of names; got 'ab'"),
        ({"columns": [0]}, r"columns must be a list of names; got \[0\]"),
        ({"split": "validation"}, "split must be one of train, test; got 'validation'"),
        ({"split": "train[:0]"}, "a slice must hold examples"),
        ({"seed": -1}, "seed can't be negative; got -1"),
    ],
)
def test_what_is_asked_for_must_be_there(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        data.load_table(write(tmp_path / "t.csv"), **options)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file .*t.csv with .*: it does not ex"):
        data.load_table(tmp_path / "t.csv")
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        data.load_table(tmp_path)
    for name, content, message in (
        ("t.parquet", b"PAR1", r"must end in \.npz, \.csv, .*t.parquet"),
        ("t.npz", b"text", "must be an .npz file of arrays"),
        ("t.csv", "a,b\n1,2\n".encode("utf-16"), "must be UTF-8 text"),
        ("u.csv", b'a,b\n1,2\n3,"' + b"4" * 200_000 + b'"\n', "text with a delimiter; got field"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            data.load_table(tmp_path / name)


def shared(name):
    """A file in the folder that FMJAX_DATA_DIR names, or else in the one beside the repository."""
    beside = pathlib.Path(__file__).parents[3] / "shared" / "data"
    root = pathlib.Path(os.environ.get("FMJAX_DATA_DIR") or beside)
    if not (root / name).is_file():
        pytest.skip(f"no {name} in {root}; FMJAX_DATA_DIR names another folder")
    return root / name


def test_cells_in_ten_dimensions_at_four_times():
    """emt.csv of the epithelial-mesenchymal transition: 577, 885, 788 and 883 cells, published."""
    table = whole(shared("singlecell_time/emt.csv"), conditions=["samples"])
    assert table.x.shape == (3133, 10) and table.names == tuple(f"x{k}" for k in range(1, 11))
    assert table.conditions is not None
    times, counts = np.unique(table.conditions, return_counts=True)
    assert (times == range(4)).all() and counts.tolist() == [577, 885, 788, 883]
    lines = np.loadtxt(shared("singlecell_time/emt.csv"), delimiter=",", skiprows=1)
    np.testing.assert_array_equal(by_rows(table.x), by_rows(lines[:, 1:]))


def test_protein_angles_of_one_array_among_many():
    file = shared("top8000_torsions/top8000_torsions.npz")
    table = whole(file, columns=["cispro"])
    assert table.x.shape == (2780, 3)
    with pytest.raises(ValueError, match="equally many rows; got .*cispro 2780"):
        whole(file)
