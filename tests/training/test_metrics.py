import json
import math

import pytest
import torch

from rankfold.training.metrics import Score, mean_loss


def test_a_loss_that_is_not_finite_is_null_in_json() -> None:
    assert json.loads(json.dumps(Score(math.nan, None, 3).to_dict(), allow_nan=False))["loss"] is None


def test_a_loss_beyond_the_range_of_floats_has_a_perplexity_all_the_same() -> None:
    perplexity = Score(1e4, None, 1).perplexity
    assert perplexity is not None
    assert math.isfinite(perplexity)


def test_the_training_loss_counts_labels_and_not_batches() -> None:
    torch.manual_seed(0)

    class Outputs:
        logits = torch.randn(2, 4, 5)

    labels = torch.tensor([[-100, 1, 2, 3], [-100, -100, -100, 4]])
    first = torch.nn.functional.cross_entropy(Outputs.logits[0, :3], labels[0, 1:], reduction="sum")
    second = torch.nn.functional.cross_entropy(Outputs.logits[1, 2:3], labels[1, 3:], reduction="sum")
    assert mean_loss(Outputs, labels).item() == pytest.approx((first + second).item() / 4)
    assert mean_loss(Outputs, labels, 10).item() == pytest.approx((first + second).item() / 10)
