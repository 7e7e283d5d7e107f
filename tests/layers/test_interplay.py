"""Adapted models under the rest of torch: compiling, precision, functional calls, copies, moves, training."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from layers.models import VOCABULARY, adapted, gpt2, gradients, inputs, logits, made, perturb, seeded
from torch import Tensor, nn

import rankfold as rf

COMPILED: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.1}, "lora/pissa": {}, "dora": {}, "hira": {}, "hra": {}, "vera": {"rank": 4},
    "gralora": {"rank": 4}, "uni-lora": {}, "abba": {}, "lora-xs": {},
}  # fmt: skip
GATED: dict[str, dict[str, Any]] = {
    "alora": {"invocation": (inputs("llama")["input_ids"][0, 2].item(),), "rank": 4},
    "reft": {"positions": "f2+l1"},
}


class Mixed(nn.Module):
    """One layer of every kind in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 6)
        self.convolution = nn.Conv1d(6, 6, 3, padding=1, groups=2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = torch.tanh(self.linear(self.attention(x, x, x, need_weights=False)[0]))
        result: Tensor = self.convolution(x.mT).mT
        return result


IDS = torch.randint(20, (2, 7), generator=torch.Generator().manual_seed(2))
KINDS = ["embed", "attention.*", "linear", "convolution"]


@pytest.fixture(autouse=True)
def fresh_graphs() -> None:
    torch.compiler.reset()


def assert_compiles(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Assert that one graph gives the same outputs and gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wanted = model(*args, **kwargs)
        wanted.square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = compiled(*args, **kwargs)
    got.square().mean().backward()
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    found = gradients(model)
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("method", COMPILED)
def test_an_adapted_model_compiles_to_one_graph(method: str) -> None:
    model = adapted(seeded(Mixed), method, targets=["linear"], **{"rank": 2, **COMPILED[method]})
    model(IDS)
    assert_compiles(model, IDS)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_layers_of_every_kind_compile_to_one_graph(method: str) -> None:
    model = adapted(seeded(Mixed), method, targets=KINDS)
    model(IDS)
    assert_compiles(model, IDS)


def test_a_model_that_was_never_called_compiles_to_one_graph() -> None:
    model = adapted(seeded(Mixed), targets="linear")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS), model(IDS))


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "dora"])
def test_a_transformer_compiles_to_one_graph(method: str) -> None:
    model = adapted(made("llama"), method)
    logits(model, "llama")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor) -> Tensor:
            result: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
            return result

    assert_compiles(Logits(), **inputs("llama"))


@pytest.mark.parametrize("method", GATED)
def test_a_gated_change_compiles(method: str) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.block = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)

        def forward(self, input_ids: Tensor) -> Tensor:
            result: Tensor = self.block(self.embed(input_ids))
            return result

    model = adapted(seeded(Root), method, targets="block", **{"rank": 2, **GATED[method]})
    ids = IDS.clone()
    ids[0, 2] = GATED["alora"]["invocation"][0]
    model(ids)
    assert_compiles(model, ids)


# Precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*COMPILED, *GATED])
def test_a_half_precision_base_computes_in_half_and_trains_in_full_precision(method: str) -> None:
    options = {"rank": 2, **COMPILED.get(method, {}), **GATED.get(method, {})}
    options.pop("dropout", None)
    model = made("llama").to(torch.bfloat16)
    full = adapted(made("llama").to(torch.bfloat16).float(), method, **options)
    adapted(model, method, **options)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    out = logits(model, "llama")
    assert out.dtype == torch.bfloat16
    wanted = logits(full, "llama")
    assert (out.float() - wanted).norm() / wanted.norm() < 0.05
    out.float().square().mean().backward()
    logits(full, "llama").square().mean().backward()
    first, second = (torch.cat([g.flatten() for g in gradients(m).values()]) for m in (model, full))
    assert nn.functional.cosine_similarity(first, second, dim=0) > 0.98


@pytest.mark.parametrize("method", [*COMPILED, *GATED])
def test_autocast_computes_in_half_precision(method: str) -> None:
    options = {"rank": 2, **COMPILED.get(method, {}), **GATED.get(method, {})}
    options.pop("dropout", None)
    model = adapted(made("llama"), method, **options)
    wanted = logits(model, "llama")
    with torch.autocast("cpu", torch.bfloat16):
        out = logits(model, "llama")
    assert out.dtype == torch.bfloat16
    assert (out.float() - wanted).norm() / wanted.norm() < 0.05
    out.float().square().mean().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad
    )


def test_autocast_reaches_layers_of_every_kind() -> None:
    model = adapted(seeded(Mixed), "dora", targets=KINDS)
    wanted = model(IDS)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(IDS)
    assert (out.float() - wanted).norm() / wanted.norm() < 0.05
    out.float().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora/pissa", "dora", "vera", "reft", "alora"])
def test_an_adapted_model_moves_to_another_dtype_whole(method: str, dtype: torch.dtype) -> None:
    model = adapted(made("llama"), method, **{"rank": 4, **GATED.get(method, {})})
    wanted = logits(model, "llama")
    model.to(dtype)
    assert {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()} <= {
        dtype,
        torch.float32,
    }
    assert {p.dtype for p in model.parameters()} == {dtype}
    out = logits(model, "llama")
    assert out.dtype == dtype
    assert (out.double() - wanted.double()).norm() / wanted.norm() < (
        0.1 if dtype == torch.bfloat16 else 1e-5
    )


# Copies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*COMPILED, *GATED, "diablo", "svfit", "flora-tucker"])
def test_copies_and_pickles_compute_the_same_and_are_their_own(method: str) -> None:
    options = {"rank": 4, **GATED.get(method, {})} | (
        {"rank": None, "blocks": 2} if method == "diablo" else {}
    )
    model = adapted(made("llama"), method, train=("model.norm",), **options)
    wanted = logits(model, "llama")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(twin, "llama"), wanted)
        perturb(twin)
        assert not torch.allclose(logits(twin, "llama"), wanted, atol=1e-3)
        rf.remove(twin)
        assert torch.equal(logits(twin, "llama"), logits(made("llama"), "llama"))
        assert torch.equal(logits(model, "llama"), wanted)
    rf.remove(model)


def test_functional_calls_replace_adapters_and_stored_weights() -> None:
    model = adapted(seeded(Mixed), targets=KINDS)
    other = copy.deepcopy(model)
    perturb(other, seed=11)
    with torch.no_grad():
        other.linear.weight += 1
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    before = model(IDS)
    torch.testing.assert_close(torch.func.functional_call(model, state, (IDS,)), other(IDS))
    assert torch.equal(model(IDS), before)


def test_per_example_gradients_by_functional_calls() -> None:
    model = adapted(seeded(lambda: nn.Sequential(nn.Linear(6, 4))))
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    x = torch.randn(3, 6)

    def loss(values: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(model, values, (x,)).square().sum()
        return result

    for values in trained.values():
        values.requires_grad_()
    loss(trained).backward()
    model(x).square().sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(trained[name].grad, gradient)


def test_the_state_of_an_adapted_model_keeps_the_bases_names(tmp_path: Path) -> None:
    names = set(seeded(Mixed).state_dict())
    model = adapted(seeded(Mixed), targets=KINDS)
    state = model.state_dict()
    assert names <= set(state)
    assert all(".adapters.default." in name for name in set(state) - names)
    other = rf.adapt(seeded(Mixed, seed=5), "lora", rank=2, targets=KINDS)
    other.load_state_dict(state)
    assert torch.equal(other(IDS), model(IDS))
    base = seeded(Mixed, seed=5)
    base.load_state_dict({name: state[name] for name in names})
    assert torch.equal(base(IDS), rf.remove(model)(IDS))


# Trainers ---------------------------------------------------------------------------------------------


def rows() -> list[dict[str, list[int]]]:
    ids = torch.randint(3, VOCABULARY, (8, 6), generator=torch.Generator().manual_seed(4)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize(("method", "options"), [("lora", {}), ("vera", {}), ("alora", {"invocation": (5,)})])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_of_transformers_trains_an_adapter(
    tmp_path: Path, method: str, options: dict[str, Any], checkpointing: bool
) -> None:
    from transformers import Trainer, TrainingArguments

    model: Any = seeded(gpt2)
    rf.adapt(model, method, rank=4, targets="attention", **options)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    moved = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no",
        report_to=[], use_cpu=True, bf16=True, gradient_checkpointing=checkpointing, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows()).train()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    if method != "alora":
        assert any(not torch.equal(now[name], value) for name, value in moved.items())


def test_accelerate_prepares_an_adapted_model() -> None:
    from accelerate import Accelerator

    model: Any = seeded(gpt2)
    adapted(model, "alora", rank=2, invocation=(5, 6))
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.tensor([[8, 5, 6, 9, 10]])
    losses = []
    for _ in range(5):
        loss = prepared(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert accelerator.unwrap_model(prepared) is model
