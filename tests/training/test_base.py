import shutil
from pathlib import Path

import pytest
import torch
from training import tiny
from transformers import AutoConfig, AutoModelForSequenceClassification

from rankfold.errors import FormatError, Incompatible, InvalidOption, MissingPath
from rankfold.training.base import load_base, read_model_config
from rankfold.training.config import RunConfig
from rankfold.training.data import DataError
from rankfold.training.prepare import prepare


def test_a_new_head_is_named_as_fresh_and_nothing_else_is(bert: str, llama: str) -> None:
    assert load_base(bert, "classify", labels=("a", "b")).fresh == ("classifier",)
    assert load_base(llama, "classify", labels=("a", "b")).fresh == ("score",)
    assert load_base(llama, "causal").fresh == ()


def test_a_head_for_other_classes_is_replaced_and_fresh(bert: str, tmp_path: Path) -> None:
    load_base(bert, "classify", labels=("a", "b")).model.save_pretrained(tmp_path)
    shutil.copy(Path(bert) / "tokenizer.json", tmp_path)
    shutil.copy(Path(bert) / "tokenizer_config.json", tmp_path)
    assert load_base(str(tmp_path), "classify", labels=("x", "y")).fresh == ()
    wider = load_base(str(tmp_path), "classify", labels=("x", "y", "z"))
    assert wider.fresh == ("classifier",)
    assert wider.model.config.id2label == {0: "x", 1: "y", 2: "z"}


def test_a_decoder_without_a_padding_token_pads_with_its_end_mark(llama: str) -> None:
    base = load_base(llama, "causal")
    assert base.tokenizer.pad_token == "</s>"
    assert base.model.config.pad_token_id == base.tokenizer.eos_token_id


def test_the_base_has_the_asked_dtype(llama: str) -> None:
    assert load_base(llama, "causal", dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("model", ["/missing/model", "missing-model", "./missing"])
def test_a_missing_model_is_named_in_one_line(model: str) -> None:
    with pytest.raises(MissingPath, match=f"there is no model folder {model}") as raised:
        read_model_config(model)
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingPath, match="holds no model"):
        read_model_config(str(tmp_path))


def test_truncated_weights_are_refused(llama: str, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(llama, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FormatError, match="broken cannot be loaded"):
        load_base(str(broken), "causal")


def test_the_task_comes_from_the_model_else_from_the_columns(
    llama: str, bert: str, reviews: str, notes: str, tmp_path: Path
) -> None:
    classifier = tmp_path / "classifier"
    load_base(llama, "classify", labels=("bad", "good")).model.save_pretrained(classifier)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(llama) / file, classifier)
    tasks = {
        (llama, notes): "causal",
        (llama, reviews): "causal",
        (bert, reviews): "classify",
        (str(classifier), reviews): "classify",
    }
    for (model, data), task in tasks.items():
        assert prepare(RunConfig(model, data)).config.task == task
    assert prepare(RunConfig(llama, reviews, label="label")).config.task == "classify"
    assert prepare(RunConfig(llama, reviews, task="classify")).config.task == "classify"


def test_a_task_that_nothing_tells_is_asked_for(bert: str, tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "rows.jsonl", [{"text": "the dog"}])
    with pytest.raises(Incompatible, match="choose it with --task"):
        prepare(RunConfig(bert, data))


def test_the_classes_are_named_in_the_models_configuration(bert: str, reviews: str) -> None:
    prepared = prepare(RunConfig(bert, reviews))
    assert prepared.config.labels == ("bad", "good")
    assert prepared.base.model.config.label2id == {"bad": 0, "good": 1}


def test_a_classifiers_own_classes_keep_their_ids(bert: str, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(bert, id2label={0: "good", 1: "bad", 2: "fair"})
    config.label2id = {"good": 0, "bad": 1, "fair": 2}
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(bert) / file, tmp_path)
    named = tiny.write_rows(tmp_path / "named.jsonl", tiny.review_rows(4))
    numbered = tiny.write_rows(tmp_path / "ids.jsonl", [{"text": "a", "label": 2}, {"text": "a", "label": 0}])
    assert [example["labels"] for example in prepare(RunConfig(str(tmp_path), named)).training] == [
        0,
        1,
        0,
        1,
    ]
    prepared = prepare(RunConfig(str(tmp_path), numbered))
    assert [example["labels"] for example in prepared.training] == [2, 0]
    assert prepared.base.model.config.id2label[2] == "fair"
    assert prepared.base.fresh == ()


def test_a_single_class_is_refused(bert: str, tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": "x"}])
    with pytest.raises(InvalidOption, match="one class only, 'x'"):
        prepare(RunConfig(bert, data))


def test_a_label_of_the_evaluation_data_that_training_lacks_is_refused(
    bert: str, reviews: str, tmp_path: Path
) -> None:
    data = tiny.write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": "ugly"}])
    with pytest.raises(DataError, match="has the label 'ugly'; the classes are bad, good"):
        prepare(RunConfig(bert, reviews, eval_data=data))


def test_the_length_is_what_the_model_holds_and_more_is_refused(llama: str, notes: str) -> None:
    assert prepare(RunConfig(llama, notes)).config.max_length == 64
    with pytest.raises(InvalidOption, match="max-length is 65; the model holds at most 64"):
        prepare(RunConfig(llama, notes, max_length=65))


def test_the_metric_is_measured_on_the_evaluation_data_when_there_is_some(llama: str, notes: str) -> None:
    alone = prepare(RunConfig(llama, notes, max_length=8))
    assert alone.scored == alone.training[:256]
    assert "training examples" in alone.scored_on
    assert prepare(RunConfig(llama, notes, eval_data=notes)).scored_on == notes
