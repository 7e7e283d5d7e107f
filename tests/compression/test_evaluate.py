import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

import rankfold as rf
from rankfold.compression import evaluate
from rankfold.compression.evaluate import Measured, compared, latency, multiply_adds, pooled, said, similarity
from rankfold.training.metrics import Score


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_the_multiply_adds_of_a_token_are_those_that_torch_counts(keep: float) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    rf.compress(model, "svd", keep=keep, progress=False)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 16))
    assert 2 * multiply_adds(model) == counter.get_total_flops()


def test_lookups_and_heads_that_share_their_table_count_as_what_they_do() -> None:
    embedding, head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    head.weight = embedding.weight
    assert multiply_adds(nn.Sequential(embedding, head)) == 20 * 8  # of the head alone


def test_the_embedding_of_a_text_does_not_depend_on_the_padding_beside_it(bert: str) -> None:
    model = AutoModel.from_pretrained(bert).eval()
    texts = [{"input_ids": [2, 5, 6, 3]}, {"input_ids": [2, 7, 3]}]

    def put(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
        mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        return {"input_ids": ids, "attention_mask": torch.tensor(mask)}

    together, apart = pooled(model, texts, put, 2), pooled(model, texts, put, 1)
    torch.testing.assert_close(together, apart)
    assert similarity(together, apart) == pytest.approx(1)
    assert similarity(together, -apart) == pytest.approx(-1)


def test_the_latency_is_the_median_and_leaves_the_first_pass_out(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 3.0, 1.0, 50.0])
    monkeypatch.setattr(evaluate, "_seconds", lambda model, inputs: next(times))
    assert latency(nn.Linear(2, 2), {"x": torch.ones(1)}, repeats=3) == 3


def test_two_measurements_are_compared_in_numbers_and_words() -> None:
    before = Measured(100, 80, 0.2, Score(math.log(4), None, 9))
    after = Measured(60, 40, 0.1, Score(math.log(5), None, 9))
    facts = compared(before, after, 60)
    assert (facts["parameters_ratio"], facts["flops_ratio"], facts["latency_ratio"]) == (0.6, 0.5, 0.5)
    lines = said(facts).splitlines()
    assert lines[0] == "parameters  100 became 60 (60 predicted, 60.0 %)"
    assert lines[-1] == "perplexity  4 became 5"
