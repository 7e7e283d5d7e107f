"""Routed mixtures on two text tasks at once: source code, and the same with its cases swapped."""

import copy
import inspect
import random
import string
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import rankfold as rf
from rankfold.layers import require
from rankfold.weights import Router

LENGTH, ROWS = 48, 16
SOURCES = (inspect, random, string)


def texts() -> tuple[Tensor, Tensor]:
    """Return the characters of the two tasks as numbers below 128, (n, LENGTH) each."""
    lines = "".join(inspect.getsource(module) for module in SOURCES).splitlines()
    tasks = ["\n".join(lines), "\n".join(line.swapcase() for line in lines)]
    numbers = [torch.tensor([min(ord(letter), 127) for letter in text]) for text in tasks]
    return tuple(each[: len(each) // LENGTH * LENGTH].view(-1, LENGTH) for each in numbers)  # type: ignore[return-value]


CODE, SWAPPED = texts()


def fit(model: Any, data: Tensor, steps: int, rate: float, *, drawn: bool = False) -> None:
    """Train on random batches, with the losses that routers want."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        ids = data[torch.randint(len(data), (ROWS,), generator=generator)]
        optimizer.zero_grad()
        if drawn:
            rf.remix_loss(model, {"input_ids": ids, "labels": ids}).backward()
        else:
            loss = model(input_ids=ids, labels=ids).loss
            (loss + rf.auxiliary_loss(model) if hasattr(model, "_rankfold") else loss).backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def loss_on(model: Any, data: Tensor) -> float:
    """Return the mean loss on the last rows of a task."""
    ids = data[-64:]
    return float(model(input_ids=ids, labels=ids).loss)


@pytest.fixture(scope="module")
def base() -> Any:
    """A small character model that has seen a little of both."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = hf.LlamaConfig(
            vocab_size=128, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64,
        )  # fmt: skip
        model = hf.LlamaForCausalLM(config)
    fit(model, torch.cat([CODE[:-64], SWAPPED[:-64]]), 60, 5e-3)
    return model


BOTH = torch.cat([CODE[:-64], SWAPPED[:-64]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [("mixture", {"experts": 3, "top_k": 2}), ("mixture", {"shared_down": True}), ("remix", {"experts": 4})],
)
def test_a_mixture_learns_both_tasks(base: Any, method: str, options: dict[str, Any]) -> None:
    model = copy.deepcopy(base)
    before = loss_on(model, CODE), loss_on(model, SWAPPED)
    rf.adapt(model, method, rank=4, **options)
    torch.manual_seed(0)
    fit(model, BOTH, 150, 1e-2, drawn=method == "remix")
    after = loss_on(model, CODE), loss_on(model, SWAPPED)
    assert all(new < old - 0.05 for new, old in zip(after, before, strict=True)), f"{before} to {after}"
    routers = [part for e in require(model).expressions("default").values() for part in e.modules()]
    assert all(part.matrix.tensor().requires_grad for part in routers if isinstance(part, Router))


@pytest.mark.slow
def test_a_classifier_learns_which_of_two_experts_a_text_needs(base: Any) -> None:
    model = copy.deepcopy(base)
    for name, data in (("code", CODE), ("swapped", SWAPPED)):
        rf.adapt(model, "lora", rank=4, name=name)
        fit(model, data[:-64], 200, 1e-2)
    alone = {}
    for name in ("code", "swapped"):
        rf.use(model, name)
        alone[name] = loss_on(model, CODE), loss_on(model, SWAPPED)
    rf.adapt(model, "x-lora", rank=4, experts=("code", "swapped"), name="mixed")
    fit(model, BOTH, 120, 2e-2)
    mixed = loss_on(model, CODE), loss_on(model, SWAPPED)
    assert sum(mixed) < min(sum(alone["code"]), sum(alone["swapped"])) - 0.1, f"{alone} and {mixed}"
    shares = []
    for data in (CODE, SWAPPED):
        with torch.no_grad():
            model(data[-64:])
        shares.append(float(require(model).carrier.gates.current["mixed:x-lora"].values[..., 0].mean()))
    assert shares[0] > shares[1] + 0.2, f"the expert of code gets {shares}"
