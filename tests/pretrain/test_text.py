import random
from pathlib import Path

import pytest

from rankfold.errors import MissingPath
from rankfold.pretrain.text import part, read_corpus, standard_library
from rankfold.training.data import DataError


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\x89PNG\r\n", "is not text: byte 0 is not UTF-8"),
        (b"a\0b", "is not text: byte 1 is zero"),
    ],
)
def test_a_file_that_is_empty_or_not_text_is_named(tmp_path: Path, content: bytes, sentence: str) -> None:
    file = tmp_path / "file.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"file\.txt {sentence}"):
        read_corpus([str(file)], [], 0.1)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    for source in ("none.txt", "*.md"):
        with pytest.raises(MissingPath, match="no file with text"):
            read_corpus([str(tmp_path / source)], [], 0.1)
    with pytest.raises(DataError, match=r"holds no \.txt files"):
        read_corpus([str(tmp_path)], [], 0.1)


def test_files_folders_and_globs_are_read_and_empty_ones_among_them_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in (
        ("a/one.txt", "one"),
        ("a/b/two.txt", "two"),
        ("a/none.txt", ""),
        ("c.md", "three"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    for sources in (["a", "c.md"], ["a/**/*.txt", str(tmp_path / "*.md")], ["a/one.txt", "a", "c.md"]):
        corpus = read_corpus(sources, [], 0.3)
        assert sorted(corpus.training + corpus.held_out) == ["one", "three", "two"]


def test_the_held_out_documents_follow_from_what_they_say_alone(tmp_path: Path) -> None:
    draw = random.Random(1)
    documents = [str(draw.random()) * draw.randint(1, 40) for _ in range(40)]
    corpora = []
    for order in (documents, documents[::-1]):
        folder = tmp_path / str(len(corpora))
        folder.mkdir()
        for number, document in enumerate(order):
            (folder / f"{number}.txt").write_text(document)
        corpora.append(read_corpus([str(folder)], [], 0.2))
    assert corpora[0].training == corpora[1].training
    assert not set(corpora[0].training) & set(corpora[0].held_out)
    share = sum(map(len, corpora[0].held_out)) / sum(map(len, documents))
    assert 0.1 < share <= 0.2


def test_equal_documents_are_one_and_a_single_one_is_cut_after_a_line() -> None:
    training, held_out = part(["line one\nline two\nline three\nline four\n"], 0.3)
    assert (training, held_out) == (("line one\nline two\n",), ("line three\nline four\n",))
    assert part(["ab"], 0.01) == (("a",), ("b",))


def test_where_no_document_fits_in_the_share_the_shortest_is_held_out() -> None:
    assert part(["aaa", "b", "cccc"], 0.01) == (("aaa", "cccc"), ("b",))


def test_given_text_of_the_perplexity_holds_nothing_out(text: str, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("something else")
    corpus = read_corpus([text], [str(other)], 0.2)
    assert len(corpus.training) == 8
    assert corpus.held_out == ("something else",)


def test_the_standard_library_is_millions_of_characters_of_python_without_its_tests() -> None:
    documents = list(standard_library())
    assert sum(map(len, documents)) > 5_000_000
    assert any("class OrderedDict" in document for document in documents)
    assert not any("import test.support\n" in document for document in documents[:200])
