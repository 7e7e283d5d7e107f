"""Several adapters in one model: adding, using, disabling, removing and folding them."""

import copy
from typing import Any

import pytest
import torch
from layers.models import BLOCKS, Memory, adapted, logits, made, perturb, seeded
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption, InvalidRank, NotAdapted, NotDense, UnsupportedLayer

EVERY = ("lora", "lora/pissa", "dora", "lora-xs", "vera", "abba", "hira", "hra", "gralora", "diablo", "svfit",
         "uni-lora", "flora-tucker", "reft", "alora")  # fmt: skip
# vera and the like start from a product that is zero; options without which a method cannot be built
OPTIONS: dict[str, dict[str, Any]] = {
    "alora": {"invocation": (5, 6)}, "diablo": {"rank": None, "blocks": 2}, "svfit": {"rank": 4},
    "gralora": {"rank": 4}, "vera": {"rank": 4},
}  # fmt: skip


def options_of(method: str) -> dict[str, Any]:
    return {"rank": 2, **OPTIONS.get(method, {})}


@pytest.fixture
def model() -> Any:
    return made("llama")


@pytest.mark.parametrize("method", EVERY)
def test_removing_any_adapter_leaves_the_model_as_it_was(model: Any, method: str) -> None:
    model.lm_head.weight.requires_grad_(False)  # flags are restored, not all set
    memory, before = Memory(model), logits(model, "llama")
    adapted(model, method, train=("model.norm",), **options_of(method))
    logits(model, "llama").sum().backward()
    rf.remove(model)
    memory.check(model)
    assert torch.equal(logits(model, "llama"), before)
    with pytest.raises(NotAdapted, match="LlamaForCausalLM holds no adapter"):
        rf.remove(model)


@pytest.mark.parametrize("method", EVERY)
def test_disabling_any_adapter_gives_the_base(model: Any, method: str) -> None:
    before = logits(model, "llama")
    adapted(model, method, train=("model.norm",), **options_of(method))
    after, trained = logits(model, "llama"), {n for n, p in model.named_parameters() if p.requires_grad}
    with rf.disabled(model) as base:
        torch.testing.assert_close(logits(base, "llama"), before)
    assert torch.equal(logits(model, "llama"), after)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize(
    "bad",
    [
        (InvalidRank, {"rank": 17, "targets": "q_proj"}),
        (InvalidRank, {"rank": 0}),
        (InvalidOption, {"alpha": float("nan")}),
        (InvalidOption, {"name": "no spaces"}),
        (InvalidOption, {"uncalled": "maybe"}),
        (InvalidOption, {"dropout": 1.5}),
        (UnsupportedLayer, {"targets": "norm"}),
        (Incompatible, {"train": ("self_attn",), "targets": "attention"}),
    ],
    ids=lambda bad: next(iter(bad[1])) if isinstance(bad, tuple) else None,
)
@pytest.mark.parametrize("second", [False, True])
def test_a_call_that_fails_leaves_the_model_untouched(model: Any, bad: Any, second: bool) -> None:
    error, options = bad
    if second:
        adapted(model, name="first")
    memory, before = Memory(model), logits(model, "llama")
    memory = Memory(model)
    with pytest.raises(error):
        rf.adapt(model, "lora", **{"rank": 2, **options})
    memory.check(model)
    assert torch.equal(logits(model, "llama"), before)


def test_a_name_is_taken_once(model: Any) -> None:
    adapted(model)
    with pytest.raises(InvalidOption, match="already holds an adapter 'default'; choose another name"):
        rf.adapt(model, "lora", rank=2)


# Several adapters -------------------------------------------------------------------------------------


def change(layer: Any, name: str) -> Tensor:
    expression = layer.adapters[name]
    product: Tensor = (expression.leaf("up").tensor() @ expression.leaf("down").tensor()).detach()
    return product


def test_two_low_rank_changes_add_up(model: Any) -> None:
    adapted(model, name="a", targets="attention")
    adapted(model, name="b", targets=["q_proj", "mlp"], rank=3)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(4, 16)
    base = layer.original(x)
    for names in (["a", "b"], ["b", "a"]):
        rf.use(model, names)
        wanted = base + x @ (change(layer, "a") + change(layer, "b")).T
        torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)
    rf.use(model, "b")
    torch.testing.assert_close(layer(x), base + x @ change(layer, "b").T, atol=1e-5, rtol=1e-5)
    rf.use(model, [])
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("names", [["c", "b", "a", "d"], ["a", "b", "c", "d"], ["d", "c", "b", "a"]])
def test_changes_act_in_the_order_transform_modulate_add_normalise(names: list[str]) -> None:
    model: Any = seeded(lambda: nn.Sequential(nn.Linear(8, 6))).double()
    for name, method in (("d", "dora"), ("b", "hira"), ("a", "hra"), ("c", "lora")):
        rf.adapt(model, method, rank=2, name=name)
        perturb(model, seed=len(name) + ord(name))
    rf.use(model, names)
    assert rf.layers.require(model).active == ("a", "b", "c", "d")
    layer, base = model[0], model[0].weight
    with torch.no_grad():
        for below in layer.adapters.values():
            for leaf in below.leaves():
                if hasattr(leaf, "stand_on"):
                    leaf.stand_on(None)
        transformed = layer.adapters["a"].dense()
        modulation = layer.adapters["b"].dense() / base
        added = transformed * modulation + change(layer, "c")
        direction = added + change(layer, "d")
        magnitude = layer.adapters["d"].leaf("magnitude").tensor()
        wanted = direction * (magnitude / direction.norm(dim=1))[:, None]
    rf.use(model, names)
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(layer.expression.dense(), wanted)
    torch.testing.assert_close(model(x), x @ wanted.T + layer.bias)
    folded = copy.deepcopy(model)
    torch.testing.assert_close(rf.fold(folded)(x), model(x))


@pytest.mark.parametrize("method", ["dora", "hira"])
def test_two_changes_without_a_joint_meaning_are_refused(model: Any, method: str) -> None:
    adapted(model, method, name="a")
    adapted(model, method, name="b")
    after = logits(model, "llama")
    with pytest.raises(Incompatible, match=r"adapters \['a', 'b'\] all \w+ the weight"):
        rf.use(model, ["a", "b"])
    assert rf.layers.require(model).active == ("b",)
    assert torch.equal(logits(model, "llama"), after)


def test_using_an_adapter_trains_it_and_freezes_the_others(model: Any) -> None:
    adapted(model, name="a")
    adapted(model, name="b")
    for names in (["a"], ["b"], ["a", "b"], []):
        rf.use(model, names)
        trained = {
            n.split(".adapters.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad
        }
        assert trained == set(names)


def test_an_unknown_adapter_is_refused_with_near_names(model: Any) -> None:
    adapted(model, name="legal")
    with pytest.raises(NotAdapted, match="no adapter 'leagl' in the model; did you mean legal"):
        rf.use(model, "leagl")
    with pytest.raises(NotAdapted, match="no adapter 'x'"):
        rf.remove(model, "x")


def test_optimizers_keep_their_parameters_over_use_and_disabled(model: Any) -> None:
    adapted(model, name="a", train=("model.norm",))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def step() -> None:
        logits(model, "llama").square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    adapted(model, name="b")
    rf.use(model, "a")
    with rf.disabled(model):
        logits(model, "llama")
    before, parameters = (
        logits(model, "llama"),
        {id(p) for group in optimizer.param_groups for p in group["params"]},
    )
    assert parameters == {id(p) for p in model.parameters() if p.requires_grad}
    step()
    assert not torch.equal(logits(model, "llama"), before)


def test_removing_one_of_two_adapters_keeps_the_other(model: Any) -> None:
    before, memory = logits(model, "llama"), Memory(model)
    adapted(model, name="a", targets="attention")
    with_a = logits(model, "llama")
    adapted(model, "vera", name="b", rank=4)
    rf.remove(model, "b")
    assert torch.equal(logits(model, "llama"), before)
    rf.use(model, "a")
    assert torch.equal(logits(model, "llama"), with_a)
    assert not any("_b_" in name for name in model.state_dict())
    rf.remove(model, "a")
    memory.check(model)


# Disabled ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "gralora", "uni-lora"])
def test_disabling_between_a_forward_and_its_backward_changes_no_gradient(method: str) -> None:
    model: Any = made("bert")  # its head is trained whole
    adapted(model, method, **options_of(method))
    logits(model, "bert").square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = logits(model, "bert").square().sum()
    with rf.disabled(model), torch.no_grad():
        reference = logits(model, "bert")
    loss.backward()
    assert set(wanted) == {n for n, p in model.named_parameters() if p.grad is not None}
    assert any(n.startswith("classifier") for n in wanted)
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name])
    assert torch.equal(reference, logits(made("bert"), "bert"))


def test_the_base_has_its_own_values_of_modules_trained_whole_while_disabled(model: Any) -> None:
    start = model.model.norm.weight.detach().clone()
    adapted(model, train=("model.norm",))
    moved = model.model.norm.weight.detach().clone()
    assert not torch.equal(moved, start)
    with rf.disabled(model), rf.disabled(model):
        assert torch.equal(model.model.norm.weight, start)
    assert torch.equal(model.model.norm.weight, moved)
    with pytest.raises(RuntimeError, match="stop"), rf.disabled(model):
        raise RuntimeError("stop")
    assert torch.equal(model.model.norm.weight, moved)


def test_disabling_keeps_what_was_frozen_or_freed_by_hand(model: Any) -> None:
    adapted(model)
    model.model.norm.weight.requires_grad_(True)
    next(p for n, p in model.named_parameters() if ".adapters." in n).requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with rf.disabled(model):
        assert not any(p.requires_grad for p in model.parameters())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_adapters_may_come_and_go_while_disabled(model: Any) -> None:
    before = logits(model, "llama")
    adapted(model, name="a")
    with_a, trained = logits(model, "llama"), {n for n, p in model.named_parameters() if p.requires_grad}
    with rf.disabled(model):
        adapted(model, name="b")
    assert torch.equal(logits(model, "llama"), with_a)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    with rf.disabled(model):
        rf.remove(model, "a")
    assert torch.equal(logits(model, "llama"), before)
    with rf.disabled(model):
        rf.remove(model)
    assert torch.equal(logits(model, "llama"), before)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_that_are_put_away_follow_the_model_to_another_dtype(model: Any, dtype: torch.dtype) -> None:
    adapted(model, train=("model.norm",), name="a")
    adapted(model, train=("model.norm",), name="b")
    model.to(dtype)
    for names in ("a", "b", []):
        rf.use(model, names)
        assert model.model.norm.weight.dtype == dtype
        assert logits(model, "llama").dtype == dtype
    rf.remove(model)
    assert {p.dtype for p in model.parameters()} == {dtype}


# Modules trained whole --------------------------------------------------------------------------------


def test_every_adapter_has_a_head_of_its_own(tmp_path: Any) -> None:
    model: Any = made("bert")
    start = model.classifier.weight.detach().clone()
    adapted(model, name="a")
    with_a = logits(model, "bert")
    adapted(model, name="b")
    perturb(model, seed=9)
    with_b = logits(model, "bert")
    rf.use(model, "a")
    assert torch.equal(logits(model, "bert"), with_a)
    rf.use(model, "b")
    assert torch.equal(logits(model, "bert"), with_b)
    with pytest.raises(Incompatible, match=r"\['a', 'b'\] each hold their own copy"):
        rf.use(model, ["a", "b"])
    rf.remove(model, "b")
    assert torch.equal(model.classifier.weight, start)
    rf.use(model, "a")
    assert torch.equal(logits(model, "bert"), with_a)
    rf.save(model, tmp_path / "a")
    assert torch.equal(logits(rf.load(made("bert"), tmp_path / "a"), "bert"), with_a)
    rf.fold(model)
    assert not torch.equal(model.classifier.weight, start)
    torch.testing.assert_close(logits(model, "bert"), with_a, atol=1e-5, rtol=1e-4)


def test_buffers_of_a_module_trained_whole_belong_to_it() -> None:
    model: Any = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))).train()
    x, start = torch.randn(8, 4) + 3, model[1].running_mean.clone()
    rf.adapt(model, "lora", rank=2, targets="0", train=("1",))
    model(x)
    moved = model[1].running_mean.clone()
    assert not torch.equal(moved, start)
    with rf.disabled(model):
        assert torch.equal(model[1].running_mean, start)
    assert torch.equal(model[1].running_mean, moved)
    rf.remove(model)
    assert torch.equal(model[1].running_mean, start)


# Summary and fold -------------------------------------------------------------------------------------


def test_a_summary_counts_what_trains(model: Any) -> None:
    adapted(model, "vera", rank=4, targets="attention", train=("model.norm",))
    summary = rf.summary(model)
    assert summary.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert summary.total == sum(p.numel() for p in model.parameters())
    assert summary.share == summary.trainable / summary.total
    assert len(summary.rows) == 4 * BLOCKS
    assert summary.whole == ("model.norm.weight",)
    assert f"trained {summary.trainable:,} of {summary.total:,} numbers" in str(summary)


def test_folding_several_adapters_folds_the_active_ones(model: Any, tmp_path: Any) -> None:
    adapted(model, name="a")
    adapted(model, "dora", name="b")
    rf.use(model, ["b", "a"])
    after = logits(model, "llama")
    rf.fold(model)
    torch.testing.assert_close(logits(model, "llama"), after, atol=1e-5, rtol=1e-4)
    assert all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again.eval(), "llama"), logits(model, "llama"))


@pytest.mark.parametrize("method", ["reft", "alora"])
def test_what_acts_on_activations_refuses_to_be_folded_and_stays(model: Any, method: str) -> None:
    adapted(model, method, **options_of(method))
    after, memory = logits(model, "llama"), Memory(model)
    with pytest.raises(NotDense, match=r"cannot be folded"):
        rf.fold(model)
    memory.check(model)
    assert torch.equal(logits(model, "llama"), after)


def test_a_part_of_an_adapted_model_says_where_the_adapter_is(model: Any) -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    adapted(model)
    with pytest.raises(NotAdapted, match="Outer holds no adapter; its part 'inner' does"):
        rf.summary(Outer(model))
