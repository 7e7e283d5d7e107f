from pathlib import Path
from typing import Any

import pytest
import torch
from training import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankfold.training.base import load_base
from rankfold.training.data import DataError, read_table
from rankfold.training.examples import IGNORED, classified, collator, continued, label_ids
from rankfold.training.metrics import evaluate


@pytest.fixture
def words(llama: str) -> Any:
    return AutoTokenizer.from_pretrained(llama)


def _table(path: Path, rows: list[dict[str, Any]]) -> Any:
    return read_table(tiny.write_rows(path / "rows.jsonl", rows))


def test_a_text_row_ends_with_the_end_mark_and_counts_every_token(tmp_path: Path, words: Any) -> None:
    [example] = continued(_table(tmp_path, [{"text": "the dog sleeps"}]), words, None, 64)
    assert words.decode(example["input_ids"]) == "<s> the dog sleeps </s>"
    assert example["labels"] == [IGNORED, *example["input_ids"][1:]]


def test_a_text_file_is_joined_and_cut_into_pieces_without_loss(notes: str, words: Any) -> None:
    examples = continued(read_table(notes), words, None, 16)
    whole = [*words(Path(notes).read_text())["input_ids"], words.eos_token_id]
    assert [len(example["input_ids"]) for example in examples[:-1]] == [16] * (len(examples) - 1)
    assert [token for example in examples for token in example["input_ids"]] == whole


def test_a_prompts_tokens_are_not_counted_and_its_completions_are(tmp_path: Path, words: Any) -> None:
    rows = [{"prompt": "a good film", "completion": "with a warm heart"}]
    [example] = continued(_table(tmp_path, rows), words, None, 64)
    counted = [token for token in example["labels"] if token != IGNORED]
    assert words.decode(example["input_ids"]) == "<s> a good film with a warm heart </s>"
    assert words.decode(counted) == "with a warm heart </s>"
    assert example["labels"][-len(counted) :] == counted


@pytest.mark.parametrize(("max_length", "kept"), [(6, "film with a warm heart </s>"), (3, "film with a")])
def test_a_long_prompt_loses_its_beginning_before_the_completion_its_end(
    max_length: int, kept: str, tmp_path: Path, words: Any
) -> None:
    rows = [{"prompt": "a good film", "completion": "with a warm heart"}]
    [example] = continued(_table(tmp_path, rows), words, None, max_length)
    assert words.decode(example["input_ids"]) == kept
    assert example["labels"][0] == IGNORED
    assert example["labels"][1:] == example["input_ids"][1:]


def test_a_conversation_counts_what_the_template_marks_as_the_assistants(tmp_path: Path, words: Any) -> None:
    messages = [
        {"role": "user", "content": "the fox waits"},
        {"role": "assistant", "content": "good night"},
        {"role": "user", "content": "hello"},
    ]
    [example] = continued(_table(tmp_path, [{"messages": messages}]), words, None, 64)
    counted = [token for token in example["labels"] if token != IGNORED]
    assert words.decode(counted) == "good night"
    assert "user the fox waits assistant good night user hello" in words.decode(example["input_ids"])


def test_a_conversation_counts_whole_where_the_template_marks_nothing(tmp_path: Path, words: Any) -> None:
    words.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good night"}]
    [example] = continued(_table(tmp_path, [{"messages": messages}]), words, None, 64)
    assert example["labels"] == [IGNORED, *example["input_ids"][1:]]


def test_messages_without_a_chat_template_are_refused(tmp_path: Path, words: Any) -> None:
    words.chat_template = None
    rows = [{"messages": [{"role": "user", "content": "hello"}]}]
    with pytest.raises(DataError, match="no chat template"):
        continued(_table(tmp_path, rows), words, None, 64)


def test_rows_without_a_token_to_predict_are_dropped_and_only_those_is_an_error(
    tmp_path: Path, words: Any
) -> None:
    words.eos_token = None
    assert len(continued(_table(tmp_path, [{"text": ""}, {"text": "the dog"}]), words, None, 8)) == 1
    with pytest.raises(DataError, match="no token to predict"):
        continued(_table(tmp_path, [{"text": ""}]), words, None, 8)


def test_a_class_example_is_cut_and_keeps_its_closing_mark(bert: str, reviews: str) -> None:
    words = AutoTokenizer.from_pretrained(bert)
    examples = classified(
        read_table(reviews), words, names=("bad", "good"), text="text", label="label", max_length=5
    )
    assert [example["labels"] for example in examples[:2]] == [1, 0]
    assert words.decode(examples[0]["input_ids"]) == "[CLS] a good film [SEP]"


def test_an_unknown_label_is_named_with_the_classes() -> None:
    with pytest.raises(DataError, match=r"test\.csv has the label 'ugly'; the classes are bad, good"):
        label_ids(["good", "ugly"], ("bad", "good"), "test.csv")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_attended_to_nor_counted(side: str, llama: str, tmp_path: Path) -> None:
    base = load_base(llama, "causal")
    base.tokenizer.padding_side = side
    collate = collator("causal", base.tokenizer)
    rows = [{"text": "the dog sleeps"}, {"text": "the quick brown fox jumps"}]
    short, long = continued(_table(tmp_path, rows), base.tokenizer, None, 64)
    batch = collate([short, long])
    assert batch["attention_mask"].sum(1).tolist() == [5, 7]
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [4, 6]
    together = evaluate(base.model, [short, long], collate, batch_size=2)
    apart = [evaluate(base.model, [example], collate, batch_size=1) for example in (short, long)]
    assert together.count == 10
    assert together.loss == pytest.approx(sum(score.loss * score.count for score in apart) / 10, rel=1e-5)


def test_the_loss_of_a_text_is_transformers_own(llama: str, notes: str) -> None:
    base = load_base(llama, "causal")
    examples = continued(read_table(notes), base.tokenizer, None, 8)[:6]
    score = evaluate(base.model, examples, collator("causal", base.tokenizer), batch_size=4)
    ids = torch.tensor([example["input_ids"] for example in examples])
    expected = AutoModelForCausalLM.from_pretrained(llama)(input_ids=ids, labels=ids).loss
    assert score.loss == pytest.approx(expected.item(), rel=1e-5)
    assert score.perplexity == pytest.approx(expected.exp().item(), rel=1e-5)
    assert score.accuracy is None


def test_accuracy_is_the_share_of_right_classes(bert: str, reviews: str) -> None:
    base = load_base(bert, "classify", labels=("bad", "good"))
    examples = classified(
        read_table(reviews), base.tokenizer, names=("bad", "good"), text="text", label="label", max_length=16
    )
    base.model.get_submodule("classifier").bias.data = torch.tensor([0.0, 99.0])
    score = evaluate(base.model, examples[:5], collator("classify", base.tokenizer), batch_size=2)
    assert (score.accuracy, score.count, score.perplexity) == (0.6, 5, None)


def test_evaluation_keeps_the_mode_of_the_model(bert: str, reviews: str) -> None:
    base = load_base(bert, "classify", labels=("bad", "good"))
    examples = [{"input_ids": [2, 4, 3], "labels": 0}]
    for training in (True, False):
        base.model.train(training)
        evaluate(base.model, examples, collator("classify", base.tokenizer), batch_size=2)
        assert base.model.training is training
