"""Several gated adapters in one forward: none takes what another leaves, remembers or asks."""

import functools
from typing import Any

import pytest
import torch
from layers.models import llama, perturb, seeded
from torch import Tensor, nn

import rankfold as rf
from rankfold.weights import Router

ALORA = {"rank": 4, "invocation": (5, 6)}
X_LORA = {"rank": 2, "experts": 3}
MIXTURE = {"rank": 2, "experts": 3}


def ids() -> Tensor:
    """Two rows, invoked at different places."""
    drawn = torch.randint(8, 40, (2, 9), generator=torch.Generator().manual_seed(3))
    drawn[0, 4:6] = drawn[1, 6:8] = torch.tensor((5, 6))
    return drawn


def together(*methods: tuple[str, dict[str, Any]], alike: bool = False) -> Any:
    """A language model with one adapter per method, all in use; `alike` gives each its values by method."""
    model: Any = seeded(llama)
    for number, (method, options) in enumerate(methods):
        rf.adapt(
            model, method, name=f"{method}{'' if alike else number}", seed=0 if alike else number, **options
        )
        perturb(model, 0.3, seed=len(method) if alike else number)
    rf.use(model, [f"{method}{'' if alike else number}" for number, (method, _) in enumerate(methods)])
    return model


def routers(model: nn.Module) -> list[Router]:
    return [part for part in model.modules() if isinstance(part, Router)]


def test_every_mixture_leaves_its_own_balance_loss() -> None:
    model = together(("mixture", MIXTURE), ("mixture", {**MIXTURE, "experts": 4})).train()
    model(ids())
    rf.auxiliary_loss(model).backward()
    assert len(routers(model)) == 28
    assert all(router.matrix.tensor().grad.any() for router in routers(model))


def test_every_drawing_adapter_learns_by_its_policy() -> None:
    options = {"rank": 2, "experts": 4}
    model = together(("remix", options), ("remix", {**options, "experts": 3})).train()
    rf.remix_loss(model, {"input_ids": ids(), "labels": ids()}).backward()
    assert len(routers(model)) == 28
    assert all(router.matrix.tensor().grad.any() for router in routers(model))


def test_drawing_adapters_remember_their_own_selections() -> None:
    options = {"rank": 2, "experts": 8, "top_k": 1}
    model = together(("remix", options), ("remix", {**options, "experts": 2})).eval()
    with torch.no_grad():
        out = model(ids()[:, :1].repeat(1, 9), use_cache=True)  # the mean of equal tokens is that token
        last = model(ids()[:, :1], past_key_values=out.past_key_values, use_cache=True).logits
        full = model(ids()[:, :1].repeat(1, 10)).logits[:, -1:]
    torch.testing.assert_close(last, full, atol=1e-5, rtol=1e-4)


class Twice(nn.Module):
    """A model that calls its layer two times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        once: Tensor = self.layer(x)
        again: Tensor = self.layer(once.tanh())
        return again


def test_a_layer_called_twice_leaves_two_losses() -> None:
    torch.manual_seed(0)
    model = rf.adapt(Twice(), "mixture", rank=2, experts=3, targets="layer", balance=1.0).train()
    nn.init.zeros_(routers(model)[0].matrix.tensor())
    model(torch.randn(2, 5, 6))
    torch.testing.assert_close(rf.auxiliary_loss(model), torch.tensor(2.0))  # one at uniform routing


def test_a_classifier_reads_other_gated_changes_in_whatever_order_they_came() -> None:
    first, second = (
        together(*methods, alike=True).eval()
        for methods in ([("alora", ALORA), ("x-lora", X_LORA)], [("x-lora", X_LORA), ("alora", ALORA)])
    )
    values = dict(first.named_parameters())
    for name, parameter in second.named_parameters():
        parameter.data.copy_(values[name])
    torch.testing.assert_close(second(ids()).logits, first(ids()).logits)


@pytest.mark.parametrize("turned", [False, True])
def test_a_first_pass_leaves_nothing_and_asks_for_no_gradient(turned: bool) -> None:
    methods = [("x-lora", X_LORA), ("mixture", MIXTURE)]
    model = together(*methods[:: -1 if turned else 1]).train()
    (model(ids(), labels=ids()).loss + rf.auxiliary_loss(model)).backward()
    assert all(router.matrix.tensor().grad.any() for router in routers(model))


@pytest.mark.parametrize("beams", [1, 3])
def test_two_classifiers_generate_with_a_cache_what_full_forwards_give(beams: int) -> None:
    model = together(("x-lora", X_LORA), ("x-lora", {**X_LORA, "experts": 2})).eval()
    perturb(model, 0.3, seed=5)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    generate = functools.partial(
        model.generate, ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=6, num_beams=beams,
        do_sample=False,
    )  # fmt: skip
    assert torch.equal(generate(use_cache=True), generate(use_cache=False))
