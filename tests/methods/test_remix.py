"""ReMix: constant weights, and a router that learns from losses alone."""

import copy
import itertools
from typing import Any

import pytest
import torch
from layers.models import llama
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption, NotAdapted
from rankfold.layers import NeverRead, require
from rankfold.methods.routing import leave_one_out, log_probability
from rankfold.weights import Router

WIDTH = 4


def adapted(experts: int = 4, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 3)).double()
    rf.adapt(model, "remix", rank=1, targets="0", experts=experts, **options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
    return model.train()


def router_of(model: nn.Module) -> Router:
    return next(m for m in model.modules() if isinstance(m, Router))


def tokens(rows: int = 2, count: int = 5) -> Tensor:
    return torch.randn(rows, count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().flatten(1).mean(1)


def test_probabilities_of_ordered_draws_sum_to_one() -> None:
    logits = torch.randn(5, dtype=torch.float64)
    draws = torch.tensor(list(itertools.permutations(range(5), 3)))
    total = log_probability(logits.expand(len(draws), 5), draws).exp().sum()
    torch.testing.assert_close(total, torch.ones((), dtype=torch.float64))


def test_draws_follow_the_probabilities() -> None:
    model, x = adapted(experts=3, top_k=2), tokens(1, 1).expand(20_000, 1, WIDTH)
    router = router_of(model)
    router.matrix.tensor().data *= 0.5
    model(x)
    (score,) = require(model).carrier.gates.drawn.values()
    log_p = score()
    values, counts = log_p.exp().detach().round(decimals=9).unique(return_counts=True)
    assert len(values) == 6
    torch.testing.assert_close(counts / 20_000, values.to(torch.float32), atol=0.012, rtol=0)


def enumerated(draws: int) -> tuple[Tensor, Tensor]:
    """Return the mean of the router's gradient over all tuples of draws, and that of the mean loss."""
    model, x = adapted(experts=3, top_k=1), tokens(1, 1)
    router = router_of(model)
    matrix = router.matrix.tensor()
    choices = torch.arange(3)[:, None]
    losses = []
    for choice in choices:
        gates = torch.zeros(1, 1, 3, dtype=torch.float64)
        gates[..., choice] = 1.0
        experts = next(m for m in model.modules() if getattr(m, "choose", None) is router)
        ups, downs = experts.up.tensor().chunk(3, 1), experts.down.tensor().chunk(3)
        out = model[0].original(x) + x @ downs[int(choice)].T @ ups[int(choice)].T
        losses.append(out.square().mean().detach())
    log_p = torch.stack([log_probability(router.logits(x)[0, 0], choice) for choice in choices])
    grads = [torch.autograd.grad(value, matrix, retain_graph=True)[0] for value in log_p]
    wanted = torch.autograd.grad((log_p.exp() * torch.stack(losses)).sum(), matrix, retain_graph=True)[0]
    total = torch.zeros_like(wanted)
    for drawn in itertools.product(range(3), repeat=draws):
        picked = torch.stack([losses[i] for i in drawn])
        weight = torch.stack([log_p[i].exp() for i in drawn]).prod().detach()
        advantage = leave_one_out(picked)
        total += weight * sum(a * grads[i] for a, i in zip(advantage, drawn, strict=True))
    return total, wanted


@pytest.mark.parametrize("draws", [2, 3])
def test_the_estimator_is_unbiased(draws: int) -> None:
    found, wanted = enumerated(draws)
    torch.testing.assert_close(found, wanted)


def test_the_loss_gives_that_gradient_for_what_was_drawn() -> None:
    model, x = adapted(experts=3, top_k=1), tokens()
    router, losses, scores = router_of(model), [], []

    def recorded(model: nn.Module, batch: Tensor) -> Tensor:
        losses.append(squares(model, batch))
        scores.extend(score() for score in require(model).carrier.gates.drawn.values())
        return losses[-1]

    torch.manual_seed(3)
    rf.remix_loss(model, x, recorded, draws=3).backward()
    matrix = router.matrix.tensor()
    rewards, log_p = torch.stack(losses).detach(), torch.stack(scores)
    score = ((rewards - rewards.mean(0)) * log_p).sum(0).mean() / 2
    torch.testing.assert_close(matrix.grad, torch.autograd.grad(score, matrix)[0])


def test_a_constant_added_to_all_losses_changes_nothing() -> None:
    model, x = adapted(), tokens()
    found = []
    for constant in (0.0, 100.0):
        model.zero_grad()
        torch.manual_seed(5)
        rf.remix_loss(model, x, lambda m, b, c=constant: squares(m, b) + c).backward()
        found.append(router_of(model).matrix.tensor().grad.clone())
    torch.testing.assert_close(found[0], found[1], atol=1e-9, rtol=1e-7)


def test_the_router_gets_nothing_from_the_task_loss_alone() -> None:
    model, x = adapted(), tokens()
    squares(model, x).mean().backward()
    assert router_of(model).matrix.tensor().grad is None


@pytest.mark.parametrize("training", [True, False])
def test_exactly_k_experts_act_with_equal_weights(training: bool) -> None:
    model = adapted(experts=6, top_k=3).train(training)
    model(tokens())
    with router_of(model).gates.held():
        gates = router_of(model).gates_for(tokens())
    assert gates.shape == (2, 1, 6)
    size = gates.sum(-1).square() / gates.square().sum(-1)
    torch.testing.assert_close(size, 3 * torch.ones_like(size))
    torch.testing.assert_close(gates.sum(-1), torch.ones_like(size))


def test_the_weight_of_the_drawn_experts_may_be_given() -> None:
    model = adapted(experts=6, top_k=3, weight=1.0)
    model(tokens())
    with router_of(model).gates.held():
        gates = router_of(model).gates_for(tokens())
    assert (gates.count_nonzero(-1) == 3).all()
    assert gates.unique().tolist() == [0.0, 1.0]


def test_each_token_may_be_routed_for_itself() -> None:
    model = adapted(experts=6, per="token").eval()
    model(tokens())
    with router_of(model).gates.held():
        assert router_of(model).gates_for(tokens()).shape == (2, 5, 6)


@pytest.mark.parametrize("per", ["sequence", "token"])
@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 5)], ids=str)
def test_the_output_keeps_the_shape_of_the_input(per: str, shape: tuple[int, ...]) -> None:
    model, x = adapted(per=per).eval(), torch.randn(*shape, WIDTH, dtype=torch.float64)
    together = model(x)
    assert together.shape == (*shape, 3)
    torch.testing.assert_close(together, torch.cat([model(row[None]) for row in x]))


def test_padding_does_not_change_a_selection() -> None:
    model = rf.adapt(llama(), "remix", rank=2, experts=4, targets="*.q_proj").eval()
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(2))
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)], 1)
    with torch.no_grad():
        alone = model(ids).logits
        places = (mask.cumsum(1) - 1).clamp_min(0)
        beside = model(padded, attention_mask=mask, position_ids=places).logits[:, 3:]
    torch.testing.assert_close(beside, alone, atol=1e-5, rtol=1e-4)


def test_with_a_cache_the_selection_of_the_prompt_stays() -> None:
    model = rf.adapt(llama(), "remix", rank=2, experts=4).eval()
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        out = model(ids, use_cache=True)
        first = dict(require(model).carrier.gates.kept)
        model(ids[:, :1], past_key_values=out.past_key_values)
        assert all(require(model).carrier.gates.kept[name] is chosen for name, chosen in first.items())
        model(ids.flip(1), use_cache=True)
        assert all(require(model).carrier.gates.kept[name] is not chosen for name, chosen in first.items())


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_a_cache_of_an_unknown_prompt_is_refused_where_prompts_are_routed(per: str) -> None:
    model = rf.adapt(llama(), "remix", rank=2, experts=4, per=per).eval()
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        cache = llama()(ids, use_cache=True).past_key_values
        if per == "token":
            assert model(ids[:, :1], past_key_values=cache).logits.isfinite().all()
            return
        with pytest.raises(Incompatible, match="remix does not know which experts the prompt"):
            model(ids[:, :1], past_key_values=cache)


def chosen(model: nn.Module) -> dict[str, Tensor]:
    return dict(require(model).carrier.gates.kept)


def test_the_selection_follows_what_is_done_to_the_cache() -> None:
    model = rf.adapt(llama(), "remix", rank=2, experts=4, targets="*.q_proj").eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "matrix" in name:
            parameter.data.normal_(std=3.0)
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        first = chosen(model)
        assert any(not torch.equal(each[0], each[1]) for each in first.values())
        copied = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        model(ids[:, :1], past_key_values=cache)
        assert all(torch.equal(each, first[name].flip(0)) for name, each in chosen(model).items())
        copied.batch_repeat_interleave(2)
        model(ids.repeat_interleave(2, 0)[:, :1], past_key_values=copied)
        wanted = {name: each.repeat_interleave(2, 0) for name, each in first.items()}
        assert all(torch.equal(each, wanted[name]) for name, each in chosen(model).items())


@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 4), (2, 3, 5, 4)])
@pytest.mark.parametrize("per", ["sequence", "token"])
def test_the_output_has_the_inputs_shape(shape: tuple[int, ...], per: str) -> None:
    model, x = adapted(per=per), torch.randn(*shape, dtype=torch.float64)
    assert model(x).shape == (*shape[:-1], 3)
    assert model.eval()(x).shape == (*shape[:-1], 3)


def test_what_comes_before_a_rows_first_label_is_its_prompt_and_nothing_else_of_the_batch() -> None:
    model = rf.adapt(llama(), "remix", rank=2, experts=4, targets="*.q_proj").eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    ids = torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[2, 4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        padded = model(ids, attention_mask=mask, labels=labels).logits
        shifted = model(
            ids, attention_mask=mask, labels=torch.cat([labels[:, :1] * 0 - 100, labels[:, 1:]], 1)
        )
    assert torch.equal(padded, plain)
    assert torch.equal(shifted.logits, plain)


def test_checkpointing_changes_no_gradient() -> None:
    model = rf.adapt(llama(), "remix", rank=2, experts=4).train()
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(2))
    found = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        torch.manual_seed(1)
        rf.remix_loss(model, {"input_ids": ids, "labels": ids, "use_cache": False}).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_training_without_its_loss_is_named() -> None:
    model = adapted()
    model(tokens()), model(tokens())
    with pytest.warns(NeverRead, match="remix_loss"):
        model(tokens())


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_loss_that_is_a_mean_already_is_refused(rows: int) -> None:
    with pytest.raises(InvalidOption, match=r"loss of every example, \(batch,\), not \(\)"):
        rf.remix_loss(adapted(), tokens(rows), lambda model, x: squares(model, x).mean())
    with pytest.raises(InvalidOption, match="loss of every example"):
        rf.remix_loss(adapted(), tokens(rows), lambda model, x: model(x).square().flatten())
    with pytest.raises(InvalidOption, match=r"reads batch\['labels'\]"):
        rf.remix_loss(adapted(), {"input_ids": tokens(rows)})


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(InvalidOption, match="draws must be at least 2"):
        rf.remix_loss(adapted(), tokens(), squares, draws=1)
    with pytest.raises(NotAdapted, match=r"call model\.train"):
        rf.remix_loss(adapted().eval(), tokens(), squares)
    with pytest.raises(InvalidOption, match="per must be"):
        adapted(per="layer")
