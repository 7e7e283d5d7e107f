import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.errors import InvalidOption


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    for layer, decay in zip(model, (0.5, 0.1), strict=True):
        left, right = (torch.linalg.qr(torch.randn(24, 24)).Q for _ in range(2))
        layer.weight.data = left @ torch.diag(torch.exp(-decay * torch.arange(24))) @ right
    return model


@pytest.mark.parametrize("energy", [0.7, 0.9, 0.98])
def test_every_rank_is_the_smallest_that_holds_the_energy(energy: float) -> None:
    model = _model()
    spectra = [torch.linalg.svdvals(layer.weight.detach()).square() for layer in model]
    rf.compress(model, "trp", share=("energy", {"energy": energy}), progress=False)
    for layer, squares in zip(model, spectra, strict=True):
        if layer.weight is None:
            rank = next(iter(layer.expression.pairs())).up.shape[1]
            assert squares[:rank].sum() >= energy * squares.sum() > squares[: rank - 1].sum()
        else:
            assert squares[:11].sum() < energy * squares.sum()  # 12 ranks take what the weight does


def test_the_energy_decides_and_keep_is_refused() -> None:
    with pytest.raises(InvalidOption, match="'energy' decides by itself how much remains"):
        rf.compress(_model(), "trp", keep=0.5, progress=False)
    with pytest.raises(InvalidOption, match=r"energy must be in \(0, 1\]"):
        rf.compress(_model(), "trp", share=("energy", {"energy": 1.5}), progress=False)
