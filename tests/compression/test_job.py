"""What every compression weight by weight keeps to, whichever method says what is near."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compression._calibrated import inputs, mean_square, normal
from safetensors import SafetensorError
from torch import Tensor, nn

import rankfold as rf
from rankfold.compression import CompressionReport, job
from rankfold.compression.objective import solved
from rankfold.compression.shares import share_named
from rankfold.errors import (
    BaseMismatch,
    Incompatible,
    InvalidOption,
    RankfoldError,
    UnknownMethod,
    UnknownTarget,
    UnsupportedLayer,
)

CATALOGUE = {m.name: m for m in rf.methods("compress") if not m.traits.get("whole", True)}
METHODS = list(CATALOGUE)
READING = [name for name, method in CATALOGUE.items() if method.traits["needs"]]
# A method whose own share decides by itself how much remains is told another one.
TOLD = {name: {"share": "uniform"} for name, m in CATALOGUE.items() if share_named(m.traits["share"]).free}
WIDTH, INNER, VOCABULARY = 12, 20, 16
every_method = pytest.mark.parametrize("method", METHODS)


class Block(nn.Module):
    """A residual block; two of its weights share an input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the next hidden states (batch, token, width)."""
        return hidden + self.down(torch.tanh(self.up(hidden)) * self.gate(hidden).sigmoid())


class Net(nn.Module):
    """Ids (batch, token) to logits, and the loss where there are labels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(WIDTH, 5)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return logits, and a loss where there are labels."""
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden)
        found = {"logits": logits}
        if labels is not None:
            found["loss"] = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return found


def net(dtype: torch.dtype = torch.float64) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().to(dtype).train()
    for weight in (model.blocks[0].up, model.blocks[1].down):
        weight.weight.data *= torch.logspace(0, -2, weight.weight.shape[1]).to(dtype)
    return model


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(VOCABULARY, (3, 8), generator=generator),
            "labels": torch.randint(5, (3, 8), generator=generator),
        }
        for _ in range(count)
    ]


def compressed(model: nn.Module, method: str = "svd-llm", **options: Any) -> nn.Module:
    given = {"keep": 0.6, "data": batches(), "progress": False, **TOLD.get(method, {}), **options}
    return rf.compress(model, method, **given)


def logits(model: nn.Module, data: list[dict[str, Tensor]] | None = None) -> Tensor:
    model.eval()
    with torch.no_grad():
        return torch.cat([model(batch["input_ids"])["logits"] for batch in data or batches()])


def is_same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether a model is as it was: no adapter, and every tensor the same."""
    now = model.state_dict()
    plain = not any("Structured" in type(module).__name__ for module in model.modules())
    return plain and list(now) == list(before) and all(torch.equal(now[key], before[key]) for key in now)


def kept(model: nn.Module) -> int:
    """Return the numbers in the places of the targeted weights."""
    found = 0
    for module in model.modules():
        expression = getattr(module, "expression", None)
        if expression is not None:
            found += expression.count().stored
        elif isinstance(module, nn.Linear):
            found += module.weight.numel()
    return found


DENSE = kept(net())


# The budget -------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("keep", [0.35, 0.6, 0.9])
def test_what_remains_is_at_most_what_was_asked_for(method: str, keep: float) -> None:
    reports: list[CompressionReport] = []
    model = compressed(net(), method, keep=keep, report=reports.append)
    assert kept(model) <= keep * DENSE
    assert kept(model) == sum(row.kept for row in reports[0].rows)
    assert sum(row.dense for row in reports[0].rows) == DENSE
    assert reports[0].kept == pytest.approx(kept(model) / DENSE)
    assert all(0 <= row.error <= 1.0001 for row in reports[0].rows)
    assert logits(model).isfinite().all()


@every_method
def test_everything_may_be_kept_and_then_nothing_changes(method: str) -> None:
    model, reports = net(), list[CompressionReport]()
    before = copy.deepcopy(model.state_dict())
    compressed(model, method, keep=1, report=reports.append)
    assert is_same(model, before)
    assert reports[0].kept == 1
    assert "nothing was compressed" in str(reports[0])


@pytest.mark.parametrize("keep", [0, -0.5, 1.01, float("nan"), float("inf"), True, "0.5"])
def test_a_share_outside_its_interval_is_refused(keep: Any) -> None:
    with pytest.raises(
        InvalidOption, match=re.escape("keep is the share of the numbers that remain, in (0, 1]")
    ):
        compressed(net(), "svd", keep=keep)


def test_a_share_that_not_even_rank_one_meets_says_how_many_numbers_it_takes() -> None:
    least = 2 * (3 * (WIDTH + INNER)) + WIDTH + 5
    with pytest.raises(InvalidOption, match=f"rank 1 in every weight takes {least} already"):
        compressed(net(), "svd", keep=0.05)


@pytest.mark.parametrize("method", ["svd", "svd-llm", "lord"])
def test_sharing_by_error_loses_less_in_the_metric_than_an_even_share(method: str) -> None:
    def loss(**options: Any) -> float:
        reports: list[CompressionReport] = []
        compressed(net(), method, keep=0.5, report=reports.append, **options)
        assert reports[0].kept <= 0.5
        return sum(row.error**2 for row in reports[0].rows)

    even, greedy, exact = loss(), loss(share="error"), loss(share=("error", {"exact": True}))
    assert exact <= greedy * (1 + 1e-9)
    assert greedy < 0.9 * even


# Errors leave no trace --------------------------------------------------------------------------------


def interrupting(monkeypatch: pytest.MonkeyPatch, at: int) -> list[str]:
    """Let solving be interrupted from the keyboard at a weight; return the weights that were begun."""
    begun: list[str] = []

    def solve(site: Any, *args: Any) -> Any:
        begun.append(site.path)
        if len(begun) == at:
            raise KeyboardInterrupt
        return solved(site, *args)

    monkeypatch.setattr(job, "solved", solve)
    return begun


@every_method
@pytest.mark.parametrize("calibration", ["parallel", "sequential"])
def test_an_interruption_leaves_the_model_as_it_was(
    method: str, calibration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    model.head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    interrupting(monkeypatch, at=4)
    with pytest.raises(KeyboardInterrupt):
        compressed(model, method, calibration=calibration)
    assert is_same(model, before)
    assert model.training
    assert not model.head.weight.requires_grad
    assert model.embed.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("method", READING)
def test_an_error_in_the_data_leaves_the_model_as_it_was(method: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    bad = [*batches(), {"input_ids": torch.tensor([[VOCABULARY]]), "labels": torch.tensor([[0]])}]
    with pytest.raises(IndexError):
        compressed(model, method, data=bad)
    assert is_same(model, before)


@every_method
@pytest.mark.parametrize("calibration", ["parallel", "sequential"])
def test_an_interrupted_compression_goes_on_bit_for_bit(
    method: str, calibration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"calibration": calibration, "share": "error", "keep": 0.5}
    whole = compressed(net(), method, **options)
    begun = interrupting(monkeypatch, at=4)
    model = net()
    with pytest.raises(KeyboardInterrupt):
        compressed(model, method, folder=tmp_path / "work", **options)
    assert is_same(model, net().state_dict())
    compressed(model, method, folder=tmp_path / "work", **options)
    assert begun.count(begun[3]) == 2  # the one that was interrupted
    assert all(begun.count(path) == 1 for path in begun[:3])  # those before it are solved once
    assert torch.equal(logits(model), logits(whole))
    again = compressed(net(), method, folder=tmp_path / "work", **options)
    assert torch.equal(logits(again), logits(whole))
    assert begun.count(begun[0]) == 1  # all is solved
    with pytest.raises(Incompatible, match=r"holds a compression with keep=0\.5, not 0\.6"):
        compressed(net(), method, folder=tmp_path / "work", **{**options, "keep": 0.6})


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    compressed(net(), "svd", folder=tmp_path)
    for options, what in (
        ({"solver": "randomised"}, "solver='exact'"), ({"seed": 3}, "seed=0"), ({"share": "error"}, "share"),
        ({"targets": ["head"]}, "weights="),
    ):  # fmt: skip
        with pytest.raises(Incompatible, match=re.escape(f"holds a compression with {what}")):
            compressed(net(), "svd", folder=tmp_path, **options)
    with pytest.raises(Incompatible, match="holds a compression with method='svd', not 'svd-llm'"):
        compressed(net(), "svd-llm", folder=tmp_path)
    file = next(path for path in tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])
    model = net()
    with pytest.raises(RankfoldError):
        compressed(model, "svd", folder=tmp_path)
    assert is_same(model, net().state_dict())


# Bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd-llm", "lord", "afm"])
def test_too_few_tokens_are_counted_aloud(method: str) -> None:
    few = [{key: value[:2] for key, value in batch.items()} for batch in batches(1)]
    sentence = (
        r"^blocks\.0\.down: the calibration data have 16 tokens, and its 20 inputs want at least as many"
    )
    with pytest.raises(InvalidOption, match=sentence):
        compressed(net(), method, data=few)
    assert logits(compressed(net(), method, data=few, few_tokens="allow")).isfinite().all()


@every_method
def test_a_weight_that_is_not_finite_is_named(method: str) -> None:
    model = net()
    model.blocks[1].gate.weight.data[2, 3] = float("nan")
    with pytest.raises(RankfoldError, match=r"blocks\.1\.gate: the weight"):
        compressed(model, method)


@pytest.mark.parametrize("method", READING)
def test_data_that_are_missing_are_asked_for(method: str) -> None:
    with pytest.raises(
        InvalidOption, match=f"{method} reads statistics of activations or gradients; pass data="
    ):
        compressed(net(), method, data=None)


def test_words_that_are_not_known_are_refused() -> None:
    with pytest.raises(UnknownMethod, match="did you mean svd-llm"):
        compressed(net(), "svd-lm")
    with pytest.raises(UnknownMethod, match="no way to share out parameters is called 'eror'"):
        compressed(net(), share="eror")
    with pytest.raises(InvalidOption, match="svd-llm has no option 'alpha'"):
        compressed(net(), alpha=1)
    with pytest.raises(InvalidOption, match="share error: exact must be true or false"):
        compressed(net(), share=("error", {"exact": "yes"}))
    with pytest.raises(InvalidOption, match=r"share error has no option 'most'"):
        compressed(net(), share=("error", {"most": 1}))
    for key in ("calibration", "solver", "few_tokens"):
        with pytest.raises(InvalidOption, match=f"{key} must be"):
            compressed(net(), **{key: "none"})
    with pytest.raises(UnknownTarget):
        compressed(net(), targets="re:nothing")
    with pytest.raises(
        UnsupportedLayer, match="embed is of the kind embedding; svd applies to plain linear and"
    ):
        compressed(net(), "svd", targets=["embed"])


def test_a_model_that_was_changed_already_is_refused_until_it_is_folded() -> None:
    model = compressed(net(), "svd")
    with pytest.raises(Incompatible, match=r"was compressed already; rankfold\.fold\(model\) first"):
        compressed(model, "svd")
    assert kept(compressed(rf.fold(model), "svd", keep=0.4)) <= 0.4 * DENSE
    with pytest.raises(Incompatible, match="holds an adapter"):
        compressed(rf.adapt(net(), "lora", rank=2), "svd")


# Calibration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd-llm", "lord", "afm"])
def test_behind_weights_that_are_compressed_already_the_output_is_nearer(method: str) -> None:
    x, plain = inputs(), nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    plain[0].weight.data, plain[2].weight.data = normal(12, 12, seed=6), normal(10, 12, seed=7)
    plain[0].bias.data, plain[2].bias.data = normal(12, seed=8), normal(10, seed=9)
    errors = {}
    for way in ("parallel", "sequential"):
        model = compressed(copy.deepcopy(plain), method, keep=0.4, data=[x], calibration=way)
        errors[way] = mean_square(plain(x), model(x))
    assert errors["sequential"] < 0.97 * errors["parallel"]


def test_every_weight_in_sequence_is_the_best_for_the_inputs_that_it_meets() -> None:
    model = compressed(net(), calibration="sequential")
    seen: dict[str, Tensor] = {}

    def note(module: nn.Module, args: Any) -> None:
        seen["x"] = torch.cat([seen["x"], args[0].flatten(0, 1)]) if "x" in seen else args[0].flatten(0, 1)

    last = model.blocks[1].down
    last.register_forward_pre_hook(note)
    logits(model)
    x, plain = seen["x"], net().blocks[1].down.weight.detach()
    product = last.expression.dense().detach()
    rank = last.expression.leaf("down").shape[0]
    least = torch.linalg.svdvals(x @ plain.T)[rank:].norm()
    assert (x @ (plain - product).T).norm() == pytest.approx(float(least), rel=1e-8)


def test_statistics_that_were_collected_before_do_as_well_as_batches() -> None:
    found = rf.collect(net(), batches(), "input_gram", progress=False)
    direct = compressed(net())
    assert torch.equal(logits(compressed(net(), data=found)), logits(direct))
    with pytest.raises(InvalidOption, match="sequential calibration runs the model again and again"):
        compressed(net(), data=found, calibration="sequential")
    other = net()
    other.blocks[0].up.weight.data += 1
    with pytest.raises(BaseMismatch):
        compressed(other, data=found)


def test_batches_may_come_from_an_iterator_and_in_passes_that_fit_into_memory() -> None:
    def once() -> Iterator[dict[str, Tensor]]:
        yield from batches()

    direct = logits(compressed(net()))
    assert torch.equal(logits(compressed(net(), data=once(), calibration="parallel")), direct)
    assert torch.equal(logits(compressed(net(), memory=8.0 * WIDTH**2)), direct)
    sequential = logits(compressed(net(), calibration="sequential"))
    assert torch.equal(logits(compressed(net(), data=once(), calibration="sequential")), sequential)


# The result -------------------------------------------------------------------------------------------


@every_method
def test_the_result_is_saved_loaded_copied_folded_and_trains(method: str, tmp_path: Path) -> None:
    model = compressed(net(), method)
    wanted = logits(model)
    assert torch.equal(logits(rf.load(net(), rf.save(model, tmp_path / "saved"))), wanted)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), wanted)
    batch = batches()[0]
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    before = float(twin(**batch)["loss"].detach())
    twin(**batch)["loss"].backward()
    optimizer.step()
    assert float(twin(**batch)["loss"].detach()) < before
    assert torch.equal(logits(model), wanted)
    folded = rf.fold(model)
    torch.testing.assert_close(logits(folded), wanted)
    assert type(folded.head) is nn.Linear
    assert list(folded.state_dict()) == list(net().state_dict())


def test_a_saved_file_says_how_it_came_to_be(tmp_path: Path) -> None:
    model = compressed(net(), "svd-llm", damping=0.1, share="error")
    text = (rf.save(model, tmp_path / "saved") / "rankfold.json").read_text()
    for word in ('"svd-llm"', '"damping": 0.1', '"share": "error"', '"keep": 0.6'):
        assert word in text


@every_method
def test_the_same_call_gives_the_same_numbers(method: str) -> None:
    for solver in ("exact", "randomised"):
        twice = [logits(compressed(net(), method, solver=solver)) for _ in range(2)]
        assert torch.equal(*twice)


@every_method
def test_a_randomised_range_is_nearly_as_good(method: str) -> None:
    def errors(solver: str) -> list[float]:
        reports: list[CompressionReport] = []
        compressed(net(), method, solver=solver, report=reports.append)
        return [row.error for row in reports[0].rows]

    for exact, near in zip(errors("exact"), errors("randomised"), strict=True):
        assert near <= 1.02 * exact + 1e-9


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_precision_of_the_model_stays(method: str, dtype: torch.dtype) -> None:
    model = compressed(net(dtype), method)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    exact = logits(compressed(net(dtype).double(), method))
    tolerance = 0.15 if dtype == torch.bfloat16 else 0.02
    assert (logits(model).double() - exact).norm() < tolerance * exact.norm()


def test_the_report_is_a_table_and_plain_data() -> None:
    reports: list[CompressionReport] = []
    compressed(net(), keep=0.6, report=reports.append)
    lines, data = str(reports[0]).splitlines(), reports[0].to_dict()
    assert len(lines) == 8
    assert re.match(r"blocks\.0\.up +20x12 +rank 4 +53\.3 % +error 0\.\d+", lines[0])
    assert f"7 weights: {DENSE:,} numbers became" in lines[-1]
    assert data["kept"] == reports[0].kept
    assert data["rows"][0]["weight"] == "blocks.0.up"
    assert [row["rank"] for row in data["rows"]] == [row.rank for row in reports[0].rows]


# Models of other people -------------------------------------------------------------------------------


def same_after_fold(model: nn.Module, run: Any) -> Any:
    """Return the model's output, which its stock form gives too."""
    wanted = run(model)
    torch.testing.assert_close(run(rf.fold(copy.deepcopy(model))), wanted, rtol=1e-4, atol=1e-5)
    return wanted


@pytest.mark.parametrize(
    "method", [name for name, found in CATALOGUE.items() if "convolution" in found.traits["layers"]]
)
def test_convolutions_are_matrices_on_patches(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, (1, 3), bias=False)
    ).double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    plain = copy.deepcopy(model)
    targets, loss = ["0", "2"], lambda net, batch: net(batch).square().mean()
    compressed(model, method, keep=0.7, data=[x], targets=targets, loss=loss)
    found = same_after_fold(model, lambda net: net(x).detach())
    assert (found - plain(x)).norm() < plain(x).norm()


@every_method
@pytest.mark.parametrize("calibration", ["parallel", "sequential"])
def test_a_layer_that_stores_its_weight_transposed_is_read_as_it_multiplies(
    method: str, calibration: str, tmp_path: Path
) -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 6)).double()
    model = nn.Sequential(Conv1D(10, 8), nn.Tanh(), Conv1D(6, 10)).double()
    for old, new in ((plain[0], model[0]), (plain[2], model[2])):
        new.weight.data, new.bias.data = old.weight.data.T.contiguous(), old.bias.data.clone()
    x = torch.randn(50, 8, dtype=torch.float64)
    options: dict[str, Any] = {
        "keep": 0.7, "data": [x], "loss": lambda net, batch: net(batch).square().mean(),
        "calibration": calibration,
    }  # fmt: skip
    compressed(plain, method, **options)
    compressed(model, method, folder=tmp_path, **options)
    torch.testing.assert_close(model(x), plain(x))


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes, **options)).eval()


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=30, **sizes)).eval()


@every_method
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_models_of_transformers_are_compressed_and_folded_back(method: str, family: str) -> None:
    ids = torch.randint(30, (20, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100) if family == "llama" else ids[:, 0] % 2
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    model = llama() if family == "llama" else bert()
    plain = {path: type(module).__name__ for path, module in model.named_modules()}
    dense = sum(
        m.weight.numel() for n, m in model.named_modules() if type(m) is nn.Linear and "head" not in n
    )
    reports: list[CompressionReport] = []
    compressed(model, method, data=[batch], report=reports.append)
    assert sum(row.kept for row in reports[0].rows) <= 0.6 * sum(row.dense for row in reports[0].rows)
    assert (
        sum(row.dense for row in reports[0].rows) >= dense - 16 * 16 - 32
    )  # BERT's pooler and its classifier
    with torch.no_grad():
        same_after_fold(model, lambda net: net(**batch).logits)
    folded = rf.fold(model)
    assert {path: type(module).__name__ for path, module in folded.named_modules()} == plain


@pytest.mark.parametrize("targets", [["model.embed_tokens"], ["model.embed_tokens", "lm_head"]])
def test_a_tied_table_and_head_stay_one(targets: list[str], tmp_path: Path) -> None:
    ids = torch.randint(30, (4, 12), generator=torch.Generator().manual_seed(0))
    model = llama(tie_word_embeddings=True)
    compressed(model, "afm", keep=0.7, data=[{"input_ids": ids}], targets=targets)
    rows = model.model.embed_tokens(torch.arange(30)[None])[0]
    x = torch.randn(3, 16)
    torch.testing.assert_close(model.lm_head(x), x @ rows.T)
    again = rf.load(llama(tie_word_embeddings=True), rf.save(model, tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        same_after_fold(model, lambda net: net(ids).logits)
    folded = rf.fold(model)
    assert folded.lm_head.weight is folded.model.embed_tokens.weight


class Twice(nn.Module):
    """One stored weight under two biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """Apply both, one after the other."""
        return self.second(torch.tanh(self.first(x)))


def test_both_biases_of_a_weight_that_is_used_twice_take_the_mean_up() -> None:
    torch.manual_seed(0)
    plain, x = Twice().double(), torch.randn(80, 10, dtype=torch.float64) + 1
    model = rf.compress(copy.deepcopy(plain), "lord", keep=0.6, data=[x], progress=False)
    moved = [getattr(model, name).bias - getattr(plain, name).bias for name in ("first", "second")]
    assert moved[0].norm() > 0.01
    torch.testing.assert_close(moved[0], moved[1])
    assert model.first.expression is model.second.expression


# What a newcomer may hand over --------------------------------------------------------------------------


class _Twice(nn.Module):
    """One layer at two places, and another that shares its tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second, self.third = self.first, nn.Linear(WIDTH, WIDTH, bias=False)
        self.third.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).relu()).relu())


def test_a_layer_that_stands_in_the_model_twice_is_compressed_once(tmp_path: Path) -> None:
    model, x = _Twice(), torch.randn(4, WIDTH)
    rf.compress(model, "svd", keep=0.9, progress=False)
    assert rf.count(model).stored == 2 * 5 * WIDTH + WIDTH
    rf.save(model, tmp_path / "small")
    torch.testing.assert_close(rf.load(_Twice(), tmp_path / "small")(x), model(x))
    expected = model(x)
    torch.testing.assert_close(rf.fold(model)(x), expected)
    assert model.first is model.second
    assert model.third.weight is model.first.weight


def test_channels_last_change_nothing_in_sequential_calibration() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    images = torch.randn(20, 4, 8, 8)
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for each in (model, twin):
        how: dict[str, Any] = {"targets": "convolutions", "calibration": "sequential", "progress": False}
        rf.compress(each, "asvd", keep=0.5, data=[images], **how)
    torch.testing.assert_close(twin(images), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("other", ["weights", "data"])
def test_a_folder_of_a_compression_of_other_tensors_is_refused(other: str, tmp_path: Path) -> None:
    model, data = nn.Sequential(nn.Linear(WIDTH, WIDTH)), torch.randn(40, WIDTH)
    how: dict[str, Any] = {"keep": 0.5, "folder": tmp_path, "progress": False}
    rf.compress(copy.deepcopy(model), "svd-llm", data=[data], **how)
    rf.compress(copy.deepcopy(model), "svd-llm", data=[data], **how)
    with torch.no_grad():
        (model[0].weight if other == "weights" else data).mul_(-1)
    with pytest.raises(Incompatible, match=f"holds a compression with .*{other}"):
        rf.compress(model, "svd-llm", data=[data], **how)


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        ("gpt2", {}, "compress takes a model that is loaded"),
        (None, {}, "compress takes a model that is loaded"),
        (nn.Linear(4, 4), {"original": "gpt2"}, "compress takes a model that is loaded"),
        (nn.Linear(4, 4), {"share": 3}, "share must be a name or a pair"),
        (nn.Linear(4, 4), {"share": ("uniform",)}, "share must be a name or a pair"),
        (nn.Linear(4, 4), {"share": ("uniform", None)}, "share must be a name or a pair"),
        (nn.Sequential(nn.Linear(4, 4)), {"targets": []}, "no targets were given"),
        (nn.Sequential(nn.Linear(4, 4)), {"share": ("uniform", {"by": 2})}, "no option 'by'; .* multiple"),
    ],
)
def test_what_is_no_model_share_or_target_is_refused(
    model: Any, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RankfoldError, match=sentence):
        rf.compress(model, "svd", progress=False, **options)


def test_a_disk_that_is_full_is_a_sentence_and_leaves_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(RankfoldError, match=r"could not be written: .* No space left"):
        rf.compress(model, "svd", keep=0.5, folder=tmp_path, progress=False)
    assert isinstance(model[0], nn.Linear)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_preset_leaves_out_what_a_method_does_not_apply_to_and_says_so() -> None:
    model, data = nn.TransformerEncoderLayer(16, 2, 32), [torch.randn(6, 4, 16)]
    notes: list[str] = []
    rf.compress(
        model, "svd-llm", keep=0.5, data=data, few_tokens="allow", progress=False,
        report=lambda report: notes.extend(report.notes),
    )  # fmt: skip
    assert model.linear1.weight is None
    assert isinstance(model.self_attn, nn.MultiheadAttention)
    left = "self_attn.in_proj, self_attn.out_proj"
    assert notes == [f"left as they were, svd-llm does not apply to them: {left}"]
    with pytest.raises(UnsupportedLayer, match=r"self_attn\.in_proj is of the kind attention"):
        rf.compress(
            nn.TransformerEncoderLayer(16, 2, 32), "svd-llm", data=data, targets="self_attn.*", progress=False
        )


def test_projections_of_attention_modules_become_products_and_matrices_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(2, 5, 16)
    original = copy.deepcopy(model)
    rf.compress(model, "svd", keep=0.5, progress=False)
    assert model.self_attn.original.in_proj_weight is None
    near, attention = copy.deepcopy(original), original.self_attn
    weights = [near.self_attn.in_proj_weight, near.self_attn.out_proj.weight]
    assert weights[0].shape == attention.in_proj_weight.shape
    for weight in (*weights, near.linear1.weight, near.linear2.weight):
        left, values, right = torch.linalg.svd(weight.detach(), full_matrices=False)
        rank = int(0.5 * weight.numel() / sum(weight.shape))
        weight.data = (left[:, :rank] * values[:rank]) @ right[:rank]
    torch.testing.assert_close(model(x), near(x))
    rf.save(model, tmp_path / "small")
    assert torch.equal(rf.load(copy.deepcopy(original), tmp_path / "small")(x), model(x))
    folded = rf.fold(copy.deepcopy(model))
    assert type(folded.self_attn) is nn.MultiheadAttention
    torch.testing.assert_close(folded(x), near(x))


def test_a_share_that_cannot_reach_the_budget_says_so() -> None:
    model, notes = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), list[str]()
    nn.init.eye_(model[0].weight)  # a flat spectrum has one level
    nn.init.eye_(model[1].weight)
    rf.compress(model, "welore", keep=0.5, progress=False, report=lambda report: notes.extend(report.notes))
    assert any("more than keep=0.5: the share 'welore'" in note for note in notes)


def test_an_original_is_refused_where_nothing_is_compensated() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(InvalidOption, match="compensates no earlier compression; leave original= away"):
        rf.compress(model, "svd", original=model, progress=False)
