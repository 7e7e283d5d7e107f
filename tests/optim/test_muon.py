"""Muon moves matrices by their orthogonalised momentum; the model's part folds away without a trace."""

from __future__ import annotations

import copy
import os
import socket
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from layers.models import VOCABULARY, llama, seeded
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import rankfold as rf
from rankfold.errors import InvalidOption, NotAdapted, UnknownTarget
from rankfold.optim.orthogonal import orthogonalised
from rankfold.optim.single_scale import SingleScaleNorm


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_five_iterations_bring_singular_values_of_a_wide_matrix_near_1_and_keep_its_vectors() -> None:
    matrix = drawn(32, 96, dtype=torch.float64)
    result = orthogonalised(matrix)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    core = left.T @ result @ right.T
    assert core.diagonal().min() > 0.68
    assert core.diagonal().max() < 1.14
    torch.testing.assert_close(core, core.diagonal().diag(), atol=1e-12, rtol=0)
    torch.testing.assert_close(orthogonalised(matrix.T), result.T)
    torch.testing.assert_close(orthogonalised(matrix.view(32, 6, 16)).view(32, 96), result)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_steps_are_torchs_up_to_its_bfloat16(shape: tuple[int, int]) -> None:
    ours, theirs = (nn.Parameter(drawn(*shape, seed=9)) for _ in range(2))
    options: Any = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    optimizers: list[Any] = [
        rf.optim.muon([("w", ours)], **options),
        torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options),
    ]
    start = ours.detach().clone()
    for step in range(4):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = drawn(*shape, seed=step)
            optimizer.step()
    change, wanted = (ours - start).detach(), (theirs - start).detach()
    assert (change - wanted).norm() < 0.02 * wanted.norm()
    assert change.square().mean().sqrt() > 0.02 * 0.2 * 0.5


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (24, 24), (12, 4, 3, 3), (30,), ()])
def test_orthogonal_changes_have_a_root_mean_square_of_a_fifth_of_the_rate(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def polar(value: Tensor, iterations: int) -> Tensor:
        left, _, right = torch.linalg.svd(value.reshape(len(value), -1), full_matrices=False)
        return (left @ right).view_as(value)

    if len(shape) > 1:
        monkeypatch.setattr(sys.modules[orthogonalised.__module__], "orthogonalised", polar)
    parameter = nn.Parameter(torch.zeros(shape))
    optimizer = rf.optim.muon([("w", parameter)], lr=0.5)
    parameter.grad = drawn(*shape)
    optimizer.step()
    assert parameter.detach().square().mean().sqrt() == pytest.approx(0.1, rel=1e-5)


def test_a_vector_moves_along_its_direction_and_a_scalar_by_its_sign() -> None:
    vector, scalar = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(()))
    optimizer = rf.optim.muon([("v", vector), ("s", scalar)], lr=1.0)
    vector.grad, scalar.grad = torch.tensor([3.0, 0, 0, 4]), torch.tensor(-7.0)
    optimizer.step()
    torch.testing.assert_close(vector.detach(), -0.4 * torch.tensor([0.6, 0, 0, 0.8]))
    torch.testing.assert_close(scalar.detach(), torch.tensor(0.2))


def test_tables_of_embeddings_and_heads_are_moved_by_adamw_and_projections_beside_them_are_not() -> None:
    model = rf.optim.outlier_safe(seeded(llama))
    optimizer = rf.optim.muon(model)
    names = {group["orthogonal"]: set(group["param_names"]) for group in optimizer.param_groups}
    assert names[False] == {"model.embed_tokens.weight", "lm_head.weight"}
    assert "model.embed_tokens.projection.weight" in names[True]
    by_words = rf.optim.muon(list(model.named_parameters()), plain=("norm",))
    plain = next(g["param_names"] for g in by_words.param_groups if not g["orthogonal"])
    assert plain == [name for name, _ in model.named_parameters() if "norm" in name]


def test_plain_groups_move_as_under_adamw() -> None:
    ours, theirs = (nn.Parameter(drawn(5, 3, seed=9)) for _ in range(2))
    options: Any = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-3}
    optimizers: list[Any] = [
        rf.optim.muon([("embed", ours)], **options),
        torch.optim.AdamW([theirs], **options),
    ]
    for step in range(4):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = drawn(5, 3, seed=step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_goes_on_bit_for_bit(dtype: torch.dtype, tmp_path: Any) -> None:
    def build() -> tuple[Any, Any]:
        layers = nn.ModuleDict({"embed": nn.Embedding(6, 4), "mid": nn.Linear(4, 6)})
        model = layers.to(dtype)
        for number, parameter in enumerate(model.parameters()):
            parameter.data = drawn(*parameter.shape, seed=number).to(dtype)
        return model, rf.optim.muon(model, lr=0.1)

    def train(model: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            for number, parameter in enumerate(model.parameters()):
                parameter.grad = drawn(*parameter.shape, seed=100 * step + number).to(dtype)
            optimizer.step()

    whole, first, second = build(), build(), build()
    train(*whole, range(6))
    train(*first, range(3))
    torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
    for part, state in zip(second, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*second, range(3, 6))
    for wanted, found in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(wanted, found)
        assert all(v.dtype != dtype or dtype == torch.float32 for v in second[1].state[found].values())


def test_a_step_with_a_gradient_that_is_not_finite_is_refused_and_changes_nothing() -> None:
    layer = nn.Linear(3, 2)
    optimizer = rf.optim.muon(layer, lr=0.1)
    before = copy.deepcopy(layer.state_dict())
    layer.weight.grad, layer.bias.grad = torch.ones(2, 3), torch.tensor([1.0, float("nan")])
    with pytest.raises(InvalidOption, match="the gradient of bias is not finite"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert not optimizer.state
    with pytest.raises(InvalidOption, match=r"momentum must be in \[0, 1\)"):
        rf.optim.muon(layer, momentum=1.0)


def test_half_precision_is_rounded_once() -> None:
    start, gradient = drawn(5, 3).bfloat16(), drawn(5, 3, seed=1).bfloat16()
    half, full = (nn.Parameter(start.to(dtype)) for dtype in (torch.bfloat16, torch.float32))
    for parameter in (half, full):
        optimizer = rf.optim.muon([("w", parameter)], lr=0.02, weight_decay=0.1)
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    assert torch.equal(half, full.bfloat16())


def test_a_weight_whose_shape_has_changed_is_refused_and_nothing_else_moves() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
    optimizer = rf.optim.muon(model, lr=0.1)
    for size in (4, 5):
        model[1].weight.data = torch.ones(size, 2)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = copy.deepcopy(model.state_dict())
        if size == 4:
            optimizer.step()
    with pytest.raises(InvalidOption, match=r"1\.weight has the shape \(5, 2\), .* made for \(4, 2\)"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# The model ----------------------------------------------------------------------------------------------


def logits_of(model: Any) -> Tensor:
    result: Tensor = model(input_ids=torch.arange(3, 9)[None] % VOCABULARY).logits
    return result


def test_a_norm_with_one_gain_commutes_with_rotations_and_one_with_gains_does_not() -> None:
    rotation = torch.linalg.qr(drawn(8, 8, dtype=torch.float64)).Q
    x, stock = drawn(3, 8, seed=1, dtype=torch.float64), nn.RMSNorm(8, eps=1e-6, dtype=torch.float64)
    stock.weight.data = drawn(8, seed=2, dtype=torch.float64)
    norm: Any = rf.optim.single_scale_norms(nn.Sequential(stock))
    torch.testing.assert_close(norm(x @ rotation), norm(x) @ rotation)
    assert norm[0].weight.numel() == 1
    assert not torch.allclose(stock(x @ rotation), stock(x) @ rotation, atol=0.1)


class CountedFromOneRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("kind", [nn.RMSNorm, CountedFromOneRMSNorm])
def test_norms_of_equal_gains_keep_what_they_compute(kind: Any, width: int) -> None:
    stock = kind(width, eps=0.1)
    nn.init.constant_(stock.weight, 0.5)
    x = drawn(3, width)
    wanted = stock(x)
    norm = rf.optim.single_scale_norms(nn.Sequential(stock))
    torch.testing.assert_close(norm(x), wanted)
    norm[0].weight.data += 0.25  # type: ignore[index, operator, union-attr]
    moved = norm(x)
    folded: Any = rf.optim.fold_outlier_safe(norm)
    assert folded[0] is stock
    torch.testing.assert_close(folded(x), moved)


def test_a_norm_that_centres_no_longer_does_and_is_folded_into_one_that_does_not() -> None:
    model: Any = rf.optim.single_scale_norms(nn.Sequential(nn.LayerNorm(6)))
    x = 3 + drawn(4, 6)
    torch.testing.assert_close(model(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    moved = model(x)
    folded: Any = rf.optim.fold_outlier_safe(model)
    assert isinstance(folded[0], nn.RMSNorm)
    torch.testing.assert_close(folded(x), moved)


@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_model_folds_into_a_stock_one_that_computes_the_same(tied: bool) -> None:
    stock = seeded(llama).double()
    if tied:
        stock.lm_head.weight = stock.model.embed_tokens.weight
    model: Any = rf.optim.outlier_safe(copy.deepcopy(stock))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.1 * drawn(*parameter.shape, seed=number, dtype=torch.float64)
    wanted = logits_of(model)
    assert not torch.allclose(wanted, logits_of(stock), atol=1e-2)
    folded = rf.optim.fold_outlier_safe(model)
    torch.testing.assert_close(logits_of(folded), wanted)
    names = {"lm_head.weight"} if tied else set()
    assert set(dict(folded.named_parameters())) == set(dict(stock.named_parameters())) | names
    assert {name: type(m) for name, m in folded.named_modules()} == {
        name: type(m) for name, m in stock.named_modules()
    }
    assert not [m for m in folded.modules() if m._forward_hooks or m._forward_pre_hooks]
    with pytest.raises(NotAdapted):
        rf.optim.fold_outlier_safe(folded)


def test_projections_are_orthogonal_seeded_and_trained() -> None:
    first, second = (rf.optim.project_embeddings(seeded(llama)) for _ in range(2))
    matrix, same = (m.get_parameter("lm_head.projection.weight") for m in (first, second))
    assert torch.equal(matrix, same)
    assert matrix.requires_grad
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-5, rtol=0)
    other = first.get_parameter("model.embed_tokens.projection.weight")
    assert not torch.allclose(matrix, other)
    with pytest.raises(UnknownTarget, match="has no embedding"):
        rf.optim.project_embeddings(nn.Sequential(nn.Linear(2, 2)))


def test_a_model_with_one_gain_and_projections_learns_under_muon() -> None:
    model = rf.optim.outlier_safe(seeded(llama)).train()
    optimizer = rf.optim.muon(model, lr=0.02)
    ids = torch.arange(12)[None] % VOCABULARY
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    gains = [m.weight for m in model.modules() if isinstance(m, SingleScaleNorm)]
    assert gains
    assert all(gain.numel() == 1 and gain.item() != 1 for gain in gains)


def test_excess_kurtosis_is_near_0_of_normal_numbers_and_large_with_an_outlying_channel() -> None:
    plain = drawn(400, 64)
    assert abs(rf.optim.excess_kurtosis(plain)) < 0.1
    plain[:, 3] *= 30
    assert rf.optim.excess_kurtosis(plain) > 30


# Two processes ------------------------------------------------------------------------------------------

PROCESSES = 2


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Embedding(5, 6), nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.RMSNorm(7))
        return rf.optim.single_scale_norms(nn.Sequential(*layers)).double()


def trained(model: nn.Module) -> nn.Module:
    optimizer = rf.optim.muon(model, lr=0.05)
    for step in range(4):
        optimizer.zero_grad()
        wanted = drawn(5, 7, seed=step, dtype=torch.float64)
        (model(torch.arange(5)) - wanted).square().mean().backward()
        optimizer.step()
    return model


def _enter(number: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=number, world_size=PROCESSES)
    try:
        model = network()
        fully_shard(model)
        trained(model)
        for found, wanted in zip(model.parameters(), trained(network()).parameters(), strict=True):
            torch.testing.assert_close(found.full_tensor(), wanted.detach())  # type: ignore[operator]
        next(model.parameters()).grad = None
        parameter: Any = list(model.parameters())[1]
        if number:
            parameter.grad.to_local()[:1] = float("nan")
        with pytest.raises(InvalidOption, match=r"the gradient of 1\.weight is not finite"):
            rf.optim.muon(model).step()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_weights_take_the_steps_of_whole_ones() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_enter, args=(port,), nprocs=PROCESSES)
