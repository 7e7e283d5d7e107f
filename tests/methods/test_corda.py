"""CorDA: the terms of the weight that a context makes large, or small."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from methods._calibrated import assert_finite, assert_reloads, best, inputs
from methods._layers import adapted, backward, base, change, convolution, disturbed, leaves_of, linear, normal
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption


def start(point: str = "lora", *, rank: int = 3, model: nn.Module | None = None, **options: Any) -> nn.Module:
    given = {key: options.pop(key) for key in ("method", "damping") if key in options}
    arguments = {"data": inputs(), "progress": False, **options}
    return adapted(rf.Recipe(point, ("corda", given)), model, rank=rank, **arguments)


def metric(batches: list[Tensor], damping: float = 0.01) -> Tensor:
    """Return C', from examples divided by their largest entries."""
    rows = [(example / example.max()) for batch in batches for example in batch]
    gram = sum(x.T @ x for x in rows) / len(rows)
    assert isinstance(gram, Tensor)
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram)).double()


def product(model: nn.Module, scaling: float = 1.0) -> Tensor:
    return scaling * leaves_of(model)["up"] @ leaves_of(model)["down"]


@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (7, 7)])
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_all_terms_together_are_the_weight(shape: tuple[int, int], method: str) -> None:
    data = inputs(shape[1])
    model = start(rank=min(shape), model=linear(*shape), data=data, method=method, alpha=4)
    torch.testing.assert_close(product(model, 4 / min(shape)), base(model))


@pytest.mark.parametrize("alpha", [3, 12])
def test_ipm_attains_the_smallest_error_under_the_gram_matrix(alpha: float) -> None:
    model, gram = start(alpha=alpha), metric(inputs())
    matrix = base(model)
    errors = [
        ((matrix - z) @ gram).norm()
        for z in (product(model, alpha / 3), best(matrix, 3), _whitened(matrix, gram))
    ]
    tail = torch.linalg.svdvals(matrix @ gram)[3:]
    torch.testing.assert_close(errors[0], tail.norm())
    assert errors[0] < 0.99 * min(errors[1:])


def _whitened(matrix: Tensor, gram: Tensor) -> Tensor:
    """Return what is best for the outputs: the metric is the root."""
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.sqrt() @ vectors.T
    return best(matrix @ root, 3) @ torch.linalg.inv(root)


@pytest.mark.parametrize(("method", "kept"), [("ipm", slice(0, 3)), ("kpm", slice(3, 6))])
def test_singular_values_are_split_evenly_between_the_factors(method: str, kept: slice) -> None:
    model, gram = start(method=method, alpha=12), metric(inputs())
    left, values, right = torch.linalg.svd(base(model) @ gram, full_matrices=False)
    leaves = leaves_of(model)
    torch.testing.assert_close(leaves["up"].T @ leaves["up"], torch.diag(values[kept] / 4))
    weighted = leaves["down"] @ gram
    torch.testing.assert_close(weighted @ weighted.T, torch.diag(values[kept] / 4), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(leaves["up"] @ weighted * 4, left[:, kept] * values[kept] @ right[kept])


def test_what_kpm_trains_matters_less_for_the_context_than_the_smallest_triplets_of_the_weight() -> None:
    x = torch.cat([batch[0] for batch in inputs()])
    kept = (x @ product(start(method="kpm")).T).norm()
    minor = (x @ product(adapted("lora/milora", rank=3)).T).norm()
    assert kept < 0.9 * minor


def test_training_on_other_inputs_forgets_less_of_the_context_than_pissa() -> None:
    # The context lies in four of sixteen directions, the task in others.
    def forgotten(method: str, **data: Any) -> float:
        model = adapted(method, linear(12, 16), rank=3, **data)
        for _ in range(60):
            model.zero_grad()
            (model(task) - wanted).square().mean().backward()
            for leaf in leaves_of(model).values():
                if leaf.requires_grad:
                    leaf.data -= 0.5 * leaf.grad
        return float((context @ change(model).T).norm().detach())

    context = torch.cat([normal(60, 4), 0.02 * normal(60, 12, seed=2)], 1)
    task, wanted = normal(60, 16, seed=3), normal(60, 12, seed=4)
    recipe: Any = rf.Recipe("lora", ("corda", {"method": "kpm"}))
    assert forgotten(recipe, data=[context[None]], progress=False) < 0.8 * forgotten("lora/pissa")


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("structure", ["lora", "dora", "gralora"])
def test_the_start_is_the_bases_output(structure: str, method: str) -> None:
    x = normal(5, 8)
    torch.testing.assert_close(start(structure, rank=2, method=method, alpha=6)(x), linear()(x))


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_the_start_is_pefts_up_to_signs(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "attr", dataclasses)  # of which peft takes the decorator alone
    from peft.tuners.lora.corda import preprocess_corda

    batches = [x.float() for x in inputs(12, count=4)]
    theirs = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6, bias=False))
    ours = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6, bias=False))
    ours.load_state_dict(theirs.state_dict())
    corda = CordaConfig(corda_method=method)  # type: ignore[arg-type]
    config = LoraConfig(
        r=3, lora_alpha=6, init_lora_weights="corda", corda_config=corda, target_modules=["0", "2"]
    )
    preprocess_corda(theirs, config, run_model=lambda: [theirs(x) for x in batches])  # type: ignore[arg-type,return-value]
    layers = get_peft_model(theirs, config).base_model.model  # type: ignore[arg-type]
    recipe = rf.Recipe("lora", ("corda", {"method": method}))
    rf.adapt(ours, recipe, rank=3, alpha=6, targets=["0", "2"], data=batches, progress=False)
    for path in ("0", "2"):
        layer = layers.get_submodule(path)
        up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        leaves = leaves_of(ours, path)
        torch.testing.assert_close(leaves["up"].abs(), up.abs(), atol=2e-4, rtol=2e-3)
        torch.testing.assert_close(leaves["up"] @ leaves["down"], up @ down, atol=2e-4, rtol=2e-3)


def test_as_a_frame_it_holds_the_weight_in_the_context() -> None:
    leaves = leaves_of(start("lora-xs"))
    left = leaves["left"]
    torch.testing.assert_close(left.T @ left, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(left @ leaves["right"], product(start()))
    svfit = leaves_of(start("svfit"))
    torch.testing.assert_close(svfit["left"], left)


def test_a_core_between_the_frame_moves_the_weight_within_it() -> None:
    model = disturbed(start("lora-xs"), 1)
    left = leaves_of(model)["left"]
    torch.testing.assert_close(left @ left.T @ change(model), change(model))


def test_without_inputs_there_is_nothing_but_the_weight() -> None:
    zero = [torch.zeros(1, 4, 8).double()]
    torch.testing.assert_close(product(start(data=zero)), best(base(start()), 3))
    torch.testing.assert_close(
        product(start(data=zero, method="kpm")), product(adapted("lora/milora", rank=3))
    )


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("damping", [0.01, 0.0])
@pytest.mark.parametrize("rank", [None, 2, 0])
def test_weights_and_inputs_of_low_rank_start_at_the_base(
    method: str, damping: float, rank: int | None
) -> None:
    few = [x[:, :2] for x in inputs(count=1)]
    for point in ("lora", "lora-xs"):
        model = start(point, model=linear(rank=rank), data=few, method=method, damping=damping)
        assert_finite(model)
        x = normal(5, 8)
        torch.testing.assert_close(
            model(x), linear(rank=rank)(x), atol=1e-3 * (point == "lora-xs") + 1e-7, rtol=1e-5
        )
        backward(model, x)
        assert all(leaf.grad.isfinite().all() for leaf in leaves_of(model).values() if leaf.requires_grad)


def test_the_damped_gram_matrix_can_be_inverted_without_doubling_the_damping() -> None:
    # One input direction among a thousand is as singular as a Gram matrix can be.
    x = normal(1024, 1)
    damped = metric([x.T[None]])
    error = (damped @ torch.linalg.inv(damped) - torch.eye(1024).double()).norm()
    assert error < 1e-6


def test_a_convolution_starts_at_its_base() -> None:
    x = normal(2, 4, 6, 5)
    torch.testing.assert_close(start(model=convolution(), data=[x])(x), convolution()(x))


def test_the_adapter_loads_without_data_in_single_precision_over_half(tmp_path: Path) -> None:
    model = start(model=linear().bfloat16(), data=[x.bfloat16() for x in inputs()])
    assert leaves_of(model)["up"].dtype == torch.float32
    assert_reloads(model, linear().bfloat16(), normal(5, 8).bfloat16(), tmp_path)


def test_the_frame_loads_without_data(tmp_path: Path) -> None:
    assert_reloads(start("lora-xs"), linear(), normal(5, 8), tmp_path)


@pytest.mark.parametrize("option", [{"method": "ipa"}, {"damping": -1.0}])
def test_options_out_of_range_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=f"corda: {next(iter(option))} must be"):
        start(**option)
