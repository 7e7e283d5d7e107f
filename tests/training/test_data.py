import json
import os
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from rankfold.errors import MissingPath
from rankfold.training.data import DataError, read_table
from rankfold.training.examples import class_names, label_values

ROWS = [{"text": 'a "quoted, word', "label": "x"}, {"text": "NA", "label": "y"}, {"text": "", "label": "x"}]


def _write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    written = [
        _write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
        _write(tmp_path / "b.json", json.dumps(ROWS)),
        _write(tmp_path / "c.csv", 'text,label\n"a ""quoted, word",x\nNA,y\n"",x\n'),
        _write(tmp_path / "d.tsv", 'text\tlabel\na "quoted, word\tx\nNA\ty\n\tx\n'),
        str(tmp_path / "e.parquet"),
    ]
    Dataset.from_list(ROWS).to_parquet(written[-1])
    for source in written:
        assert read_table(source).rows.to_list() == ROWS, source


def test_reading_leaves_nothing_beside_the_data_nor_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    folder, cache = tmp_path / "data", tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    read_table(_write(folder / "a.csv", "text,label\na,1\n"))
    assert [path.name for path in folder.iterdir()] == ["a.csv"]
    assert not cache.exists()


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.csv", "text,label\nold,1\n")
    stamp = Path(source).stat()
    read_table(source)
    _write(tmp_path / "a.csv", "text,label\nnew,1\n")
    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert read_table(source).rows["text"][:] == ["new"]


def test_a_table_without_a_header_has_numbered_columns(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.tsv", "good film\t1\nbad film\t0\n")
    assert read_table(source, header=False).rows.to_list() == [
        {"0": "good film", "1": 1},
        {"0": "bad film", "1": 0},
    ]


def test_a_folder_is_its_text_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, text in {
        "b.txt": "two",
        "a.txt": "one",
        "c.txt": " \n",
        "deep/z.txt": "three",
        "no.md": "x",
    }.items():
        _write(tmp_path / name, text)
    table = read_table(str(tmp_path))
    assert table.prose
    assert table.rows["text"][:] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "text,label\n", "a.csv cannot be read or holds no rows"),
        ("a.txt", "\n \n", "a.txt is empty"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "a.jsonl cannot be read"),
        ("a.parquet", "not parquet", "a.parquet cannot be read"),
        ("a.docx", "x", "none of the kinds .txt, .jsonl"),
    ],
)
def test_an_unreadable_or_empty_file_is_refused_in_one_line(
    name: str, text: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=sentence) as raised:
        read_table(_write(tmp_path / name, text))
    assert "\n" not in str(raised.value)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_table(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("source", ["missing.csv", "./missing", "/missing/folder"])
def test_a_missing_file_is_named(source: str) -> None:
    with pytest.raises(MissingPath, match="there is no data file or folder"):
        read_table(source)


def test_a_name_that_is_no_path_is_asked_of_the_hub_with_subset_and_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    asked = []

    def load(name: str, subset: str | None, *, split: str) -> Dataset:
        asked.append((name, subset, split))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("owner/films", "owner/films:test", "owner/films:english:test"):
        assert len(read_table(source).rows) == 3
    assert asked == [
        ("owner/films", None, "train"),
        ("owner/films", None, "test"),
        ("owner/films", "english", "test"),
    ]


def test_a_dataset_that_the_hub_does_not_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_: object, **__: object) -> Dataset:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(MissingPath, match=r"owner/films is no local file or folder, .*: no route"):
        read_table("owner/films")


def test_labels_are_names_numbers_or_the_datasets_own_names(tmp_path: Path) -> None:
    named = read_table(_write(tmp_path / "a.csv", "text,label\na,good\nb,bad\n"))
    numbered = read_table(_write(tmp_path / "b.csv", "text,label\na,10\nb,9\n"))
    path = tmp_path / "c.parquet"
    features = Features({"text": Value("string"), "label": ClassLabel(names=["z", "y"])})
    Dataset.from_list([{"text": "a", "label": 1}], features=features).to_parquet(path)
    assert label_values(named, "label") == ["good", "bad"]
    assert class_names(label_values(numbered, "label")) == ("9", "10")
    assert label_values(read_table(str(path)), "label") == ["y"]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ('{"text": "a", "label": "x"}\n{"text": "b"}\n', "row 2 has no label"),
        ('{"text": "a", "label": 0.5}\n', "label 0.5, neither a name nor a whole number"),
    ],
)
def test_a_row_without_a_usable_label_is_named(rows: str, sentence: str, tmp_path: Path) -> None:
    table = read_table(_write(tmp_path / "a.jsonl", rows))
    with pytest.raises(DataError, match=sentence):
        label_values(table, "label")


def test_a_missing_column_is_refused_with_those_that_are_there(tmp_path: Path) -> None:
    table = read_table(_write(tmp_path / "a.csv", "review,stars\na,1\n"))
    with pytest.raises(DataError, match=r"no label column 'label'; its columns are review, stars: .*--label"):
        table.require("label", "label")


def test_a_text_column_of_numbers_is_refused(tmp_path: Path) -> None:
    table = read_table(_write(tmp_path / "a.csv", "text,label\n3,1\n"))
    with pytest.raises(DataError, match="row 1 holds 3 in text, which is not text"):
        table.texts("text")
