"""Adapters switched between a forward and its backward."""

import torch
from torch import nn

import rankfold as rf


def stacked() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16)).double()
    rf.adapt(model, "lora", rank=2, name="below")
    rf.adapt(model, "diablo", blocks=1, name="above")
    rf.use(model, ["below", "above"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def gradients(switch: bool) -> list[torch.Tensor]:
    model = stacked()
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(torch.ones(40, 16, dtype=torch.float64)).square().sum()
    if switch:
        rf.use(model, "above")
        for parameter in trained:
            parameter.requires_grad_(True)
    return list(torch.autograd.grad(loss, trained))


def test_backward_is_that_of_the_adapters_of_its_forward() -> None:
    for switched, kept in zip(gradients(switch=True), gradients(switch=False), strict=True):
        assert kept.abs().max() > 0
        torch.testing.assert_close(switched, kept)
