from pathlib import Path

import pytest
import torch
from training import tiny

from rankfold.errors import FormatError, InvalidOption, MissingPath
from rankfold.pretrain.tokens import SEPARATOR, load_tokenizer, train_tokenizer
from rankfold.training.data import DataError
from rankfold.training.packed import collate, pack

TEXT = ("the cat sat on the mat", "the dog — le chien — sat on the cat")


def test_a_trained_tokenizer_gives_every_text_back() -> None:
    tokenizer = train_tokenizer(TEXT, 265)
    for text in (*TEXT, "🦊\tΩ\r\n", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 265


def test_the_same_text_gives_the_same_tokenizer(text: str) -> None:
    documents = [file.read_text() for file in sorted(Path(text).iterdir())]
    first, second = (train_tokenizer(documents, 300).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_a_vocabulary_that_the_text_does_not_support_is_refused_with_one_that_it_does() -> None:
    with pytest.raises(DataError, match=r"supports a vocabulary of (\d+) tokens and not of 5,000") as error:
        train_tokenizer(TEXT, 5000)
    supported = int(str(error.value).rpartition(" ")[2])
    assert len(train_tokenizer(TEXT, supported)) == supported


def test_a_vocabulary_without_every_byte_is_refused() -> None:
    with pytest.raises(InvalidOption, match="it needs 257"):
        train_tokenizer(TEXT, 256)


def test_documents_are_packed_one_after_the_other_with_a_separator_between_them() -> None:
    tokenizer = train_tokenizer(TEXT, 260)
    packed = pack(TEXT, tokenizer, 8, "text")
    everything = tokenizer.decode(packed.stream.tolist())
    assert everything == "".join(document + SEPARATOR for document in TEXT)
    assert torch.equal(torch.cat([packed[i] for i in range(len(packed))]), packed.stream[: 8 * len(packed)])
    assert len(packed.stream) - 8 * len(packed) < 8
    assert len(packed.first(2)) == 2
    with pytest.raises(IndexError):
        packed[len(packed)]


def test_a_batch_predicts_its_own_tokens() -> None:
    batch = collate([torch.tensor([1, 2], dtype=torch.int32), torch.tensor([3, 4], dtype=torch.int32)])
    assert batch["input_ids"].tolist() == [[1, 2], [3, 4]]
    assert batch["labels"] is batch["input_ids"]


def test_a_text_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(DataError, match="less than one sequence of 4,096"):
        pack(TEXT, train_tokenizer(TEXT, 257), 4096, "the text")


def test_tokenizers_are_loaded_from_files_and_folders(tmp_path: Path) -> None:
    train_tokenizer(TEXT, 260).save_pretrained(tmp_path / "trained")
    for name in ("trained", "trained/tokenizer.json"):
        assert load_tokenizer(str(tmp_path / name)).eos_token == SEPARATOR
    with pytest.raises(MissingPath, match="no tokenizer"):
        load_tokenizer(str(tmp_path / "none"))
    words = tiny.tokenizer(beginning="<s>", end="</s>", closes=False)
    words.eos_token = None
    words.save_pretrained(tmp_path / "endless")
    with pytest.raises(FormatError, match="give it an eos_token"):
        load_tokenizer(str(tmp_path / "endless"))
