"""Every statistic against a direct dense computation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import KINDS, Host
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import UnsupportedLayer
from rankfold.statistics import REDUCERS, Statistics, collect

BY_NAME = {host.name: host for host in KINDS}
PATH = "blocks.1.up"
Record = Callable[..., list[tuple[Tensor, Tensor]]]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def kept_rows(pairs: list[tuple[Tensor, Tensor]], batches: list[Any], side: int) -> Tensor:
    rows = [pair[side][b["attention_mask"].bool()] for pair, b in zip(pairs, batches, strict=True)]
    return torch.cat(rows)


def gradients(model: nn.Module, weight: Tensor, batches: list[Any]) -> list[Tensor]:
    model.eval()
    return [torch.autograd.grad(model(**batch)["loss"], weight)[0] for batch in batches]


def test_means_grams_and_norms_of_activations_are_those_of_all_unmasked_tokens(
    net: nn.Module, batches: list[Any], inputs_of: Record
) -> None:
    names = ("input_mean", "input_gram", "column_norm", "output_mean", "output_gram")
    found = collect(net, batches, names)[PATH]
    pairs = inputs_of(net, net.get_submodule(PATH), batches)
    x, y = kept_rows(pairs, batches, 0), kept_rows(pairs, batches, 1)
    close(found.get("input_mean"), x.mean(0))
    close(found.get("input_gram"), x.T @ x / len(x))
    close(found.get("column_norm"), x.norm(dim=0))
    close(found.get("output_mean"), y.mean(0))
    close(found.get("output_gram"), y.T @ y / len(y))
    assert found.tokens == len(x)
    assert found.batches == len(batches)
    assert found.shape == (8, 6)


def test_the_covariance_and_the_absolute_mean_are_those_of_all_unmasked_tokens(
    net: nn.Module, batches: list[Any], inputs_of: Record
) -> None:
    found = collect(net, batches, ("input_covariance", "input_absolute_mean"))[PATH]
    x = kept_rows(inputs_of(net, net.get_submodule(PATH), batches), batches, 0)
    close(found.get("input_covariance"), torch.cov(x.T, correction=0))
    close(found.get("input_absolute_mean"), x.abs().mean(0))


def test_a_large_mean_does_not_cancel_the_covariance_of_single_precision() -> None:
    x = torch.randn(4, 64, 3, generator=torch.Generator().manual_seed(0)) + 1000
    model = nn.Sequential(nn.Linear(3, 2))
    entry = collect(model, list(x), ("input_covariance", "input_mean", "input_gram"))["0"]
    wanted = torch.cov(x.double().flatten(0, 1).T, correction=0)
    close(entry.get("input_covariance"), wanted, 1e-9)
    mean, gram = entry.get("input_mean"), entry.get("input_gram")
    assert (gram - mean[:, None] * mean - wanted).abs().max() > 0.05  # as the obvious formula does


def test_parts_of_a_covariance_join_in_any_order_and_without_rows_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).double()
    sizes = (1, 5, 2)
    parts = [torch.randn(n, 3, dtype=torch.float64) + i for i, n in enumerate(sizes)]
    each = [collect(model, [part], "input_covariance") for part in parts]
    wanted = torch.cov(torch.cat(parts).T, correction=0)
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = Statistics.merge(*(each[i] for i in order))
        close(merged["0"].get("input_covariance"), wanted)
    empty = REDUCERS["input_covariance"]()
    whole = each[1]["0"].reducers[0].copy()
    whole.merge(empty)
    close(whole.value(1), torch.cov(parts[1].T, correction=0))
    empty.merge(whole)
    close(empty.value(1), torch.cov(parts[1].T, correction=0))


def test_the_frequency_of_a_row_is_its_share_of_the_ids_that_are_not_padding() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.inner(ids)  # type: ignore[no-any-return]

    batches = [
        {"ids": torch.tensor([[1, 1, 4, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])},
        {"ids": torch.tensor([[1, 3]])},
    ]
    found = collect(Model(), batches, "token_frequency", targets="re:.*0")["inner.0"]
    close(found.get("token_frequency"), torch.tensor([0.0, 0.6, 0.0, 0.2, 0.2], dtype=torch.float64))
    with pytest.raises(
        UnsupportedLayer, match="counts the rows that are looked up, and this is no embedding"
    ):
        collect(Model(), batches, "token_frequency", targets="re:.*1")


def test_the_gram_per_sample_divides_every_example_by_its_signed_maximum(
    net: nn.Module, batches: list[Any], inputs_of: Record
) -> None:
    found = collect(net, batches, [("input_gram", {"per_sample": "max"})])[PATH].get("input_gram")
    expected, count = torch.zeros(6, 6, dtype=torch.float64), 0
    for (x, _), batch in zip(inputs_of(net, net.get_submodule(PATH), batches), batches, strict=True):
        for example, mask in zip(x, batch["attention_mask"].bool(), strict=True):
            scaled = example[mask] / example[mask].max().abs()
            expected, count = expected + scaled.T @ scaled, count + 1
    close(found, expected / count)


def test_an_example_whose_maximum_is_zero_leaves_the_gram_finite() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).double()
    batch = -torch.rand(2, 4, 3, dtype=torch.float64)
    batch[0, 1, 1] = 0
    found = collect(model, [batch], [("input_gram", {"per_sample": "max"})])["0"].get("input_gram")
    second = batch[1] / batch[1].max().abs()
    close(found, (batch[0].T @ batch[0] + second.T @ second) / 2)


def test_gradient_statistics_are_those_of_the_mean_losses(net: nn.Module, batches: list[Any]) -> None:
    names = (
        "gradient", "squared_gradient", "squared_gradient_rows", "squared_gradient_columns", "sensitivity"
    )  # fmt: skip
    found = collect(net, batches, names)[PATH]
    weight = net.get_submodule(PATH).weight
    each = gradients(net, weight, batches)
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    fisher = sum(n * g**2 for n, g in zip(counts, each, strict=True)) / sum(counts)
    assert len(set(counts)) > 1
    close(found.get("gradient"), sum(each) / len(each))
    close(found.get("squared_gradient"), fisher)
    close(found.get("squared_gradient_rows"), fisher.sum(1))
    close(found.get("squared_gradient_columns"), fisher.sum(0))
    close(found.get("sensitivity"), sum((weight * g).abs().sum() for g in each).detach() / len(each))


def test_fisher_weights_are_tokens_without_labels_and_examples_without_masks() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).double()
    x = [
        torch.randn(n, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (1, 3)
    ]
    each = [torch.autograd.grad((model(v) ** 2).mean(), model[0].weight)[0] for v in x]

    def fisher(batches: list[Any], **options: Any) -> Tensor:
        def loss(m: nn.Module, b: Any) -> Tensor:
            return (m(b["x"]) ** 2).mean()  # type: ignore[no-any-return]

        return collect(model, batches, "squared_gradient", loss=loss, **options)["0"].get("squared_gradient")

    full = [{"x": v, "attention_mask": torch.ones(v.shape[:2])} for v in x]
    full[1]["attention_mask"][1:, 1:] = 0
    close(fisher(full), (4 * each[0] ** 2 + 6 * each[1] ** 2) / 10)
    close(fisher([{"x": v} for v in x]), (each[0] ** 2 + 3 * each[1] ** 2) / 4)


def quadratic(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model(x)
    return (out.tanh() ** 2).sum() + model[1].weight.pow(3).sum()  # type: ignore[index, operator, union-attr]


def test_the_hessian_diagonal_tends_to_the_exact_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    found = collect(model, [x], [("hessian_diagonal", {"samples": 2000})], loss=quadratic)
    for name, entry in found.items():
        weight = model.get_submodule(name).weight

        def of_weight(value: Tensor, name: str = name) -> Tensor:
            return quadratic_at(model, f"{name}.weight", value, x)

        hessian = torch.autograd.functional.hessian(of_weight, weight.detach())
        exact = hessian.reshape(weight.numel(), -1).diagonal().reshape(weight.shape)
        estimate = entry.get("hessian_diagonal")
        assert float((estimate - exact).norm() / exact.norm()) < 0.1


def quadratic_at(model: nn.Module, name: str, value: Tensor, x: Tensor) -> Tensor:
    with torch.nn.utils.stateless._reparametrize_module(model, {name: value}):
        return quadratic(model, x)


def test_the_hessian_diagonal_is_exact_where_the_hessian_is_diagonal() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).double()

    def cubes(m: Any, x: Tensor) -> Tensor:
        return m(x).sum() + m[0].weight.pow(3).sum()  # type: ignore[no-any-return]

    x = torch.ones(1, 3, dtype=torch.float64)
    found = collect(model, [x, x], ["hessian_diagonal", "gradient"], loss=cubes)["0"]
    close(found.get("hessian_diagonal"), 6 * model[0].weight.detach())
    close(found.get("gradient"), 1 + 3 * model[0].weight.detach() ** 2)


def test_a_loss_that_is_linear_has_no_curvature() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    found = collect(model, [torch.ones(1, 3)], "hessian_diagonal", loss=lambda m, x: m(x).sum())
    assert not found["0"].get("hessian_diagonal").any()


def test_curvature_goes_through_fused_attention() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4)).double()

    def attend(m: nn.Module, x: Tensor) -> Tensor:
        h = m(x)
        return F.scaled_dot_product_attention(h, h, h).pow(2).sum()

    x = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    found = collect(model, [x], [("hessian_diagonal", {"samples": 50})], loss=attend)
    assert found["0"].get("hessian_diagonal").any()


# Kinds of layers --------------------------------------------------------------------------------------

CONVOLUTIONS = ["convolution 1d", "convolution 2d", "convolution 3d", "pointwise convolution"]


def of_host(host: Host, what: Any, model: nn.Module, batches: list[Any]) -> Any:
    found = collect(model, batches, what, targets=host.path, loss=lambda m, x: m(x).pow(2).sum())
    return found[host.path]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_the_matrix_product_of_its_patches(name: str) -> None:
    host = BY_NAME[name]
    model, x = host.model(), host.input().detach()
    found = of_host(host, [("input_pca", {"components": 1000}), "input_gram", "output_gram"], model, [x])
    weight, y = model.layer.weight.detach().flatten(1), model(x).detach()  # type: ignore[union-attr, operator]
    bias = 0 if model.layer.bias is None else model.layer.bias.detach()  # type: ignore[union-attr]
    product = weight @ found.get("input_gram") @ weight.T
    centred = y.movedim(1, -1).flatten(0, -2) - bias  # type: ignore[operator]
    close(product, centred.T @ centred / len(centred))
    whole = y.movedim(1, -1).flatten(0, -2)
    close(found.get("output_gram"), whole.T @ whole / len(whole))
    assert found.tokens == len(whole)
    assert found.shape == tuple(weight.shape)


def test_padding_modes_and_dilation_reach_the_patches() -> None:
    layer = nn.Conv2d(3, 4, (3, 2), stride=(1, 2), dilation=2, padding=1, padding_mode="reflect").double()
    model, x = nn.Sequential(layer), torch.randn(2, 3, 7, 6, dtype=torch.float64)
    gram = collect(model, [x], "input_gram", targets="convolutions")["0"].get("input_gram")
    weight = layer.weight.detach().flatten(1)
    y = (layer(x) - layer.bias[:, None, None]).detach().movedim(1, -1).flatten(0, -2)
    close(weight @ gram @ weight.T, y.T @ y / len(y))


@pytest.mark.parametrize("host", KINDS, ids=lambda host: host.name)
def test_the_gradient_of_every_kind_of_layer_is_that_of_its_matrix(host: Host) -> None:
    model, x = host.model(), host.input().detach()
    found = of_host(host, ["gradient", "squared_gradient"], model, [x, x])
    stored = {"in_proj": "in_proj_weight", "out_proj": "out_proj.weight"}.get(host.part, "weight")
    weight = model.layer.get_parameter(stored)  # type: ignore[union-attr]
    gradient = torch.autograd.grad(model(x).pow(2).sum(), weight)[0]
    expected = gradient.T if host.name == "transposed linear" else gradient.flatten(1)
    close(found.get("gradient"), expected)
    close(found.get("squared_gradient"), expected**2)
    assert found.shape == tuple(expected.shape)


def test_a_transposed_linear_has_the_input_of_its_matrix() -> None:
    host = BY_NAME["transposed linear"]
    model, x = host.model(), host.input().detach()
    close(of_host(host, "input_gram", model, [x]).get("input_gram"), x.T @ x / len(x))


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_packed_projection_meets_the_query_of_self_attention(batch_first: bool) -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.MultiheadAttention(8, 2, batch_first=batch_first, dropout=0.5)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            x = x if batch_first else x.transpose(0, 1)
            return self.layer(x, x, x)[0]  # type: ignore[no-any-return]

    model, x = Attend().double().train(), torch.randn(3, 4, 8, dtype=torch.float64)
    mask = torch.ones(3, 4)
    mask[0, 2:] = 0
    rows = x[mask.bool()]
    for adapted in (False, True):
        if adapted:
            rf.adapt(model, "lora", rank=2, targets="layer.in_proj")
        found = collect(model, [{"x": x, "attention_mask": mask}], "input_gram", targets="layer.in_proj")
        close(found["layer.in_proj"].get("input_gram"), rows.T @ rows / len(rows))
        assert found["layer.in_proj"].tokens == len(rows)


def test_statistics_that_a_layer_does_not_have_are_refused_with_a_sentence() -> None:
    def refusal(host: str, what: Any) -> str:
        with pytest.raises(UnsupportedLayer) as caught:
            of_host(BY_NAME[host], what, BY_NAME[host].model(), [BY_NAME[host].input().detach()])
        return str(caught.value)

    assert "2 groups" in refusal("grouped convolution", "input_gram")
    assert "looks rows up" in refusal("embedding", "input_mean")
    assert "looks rows up" in refusal("embedding", "output_mean")
    assert "nn.MultiheadAttention" in refusal("attention output", "input_mean")
    assert "nn.MultiheadAttention" in refusal("attention input", "output_mean")


def test_a_grouped_convolution_still_has_output_and_gradient_statistics() -> None:
    host = BY_NAME["grouped convolution"]
    model, x = host.model(), host.input().detach()
    y = model(x).detach().movedim(1, -1).flatten(0, -2)
    close(of_host(host, "output_mean", model, [x]).get("output_mean"), y.mean(0))


def test_cross_attention_has_no_one_input() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, x + 1, x)[0]  # type: ignore[no-any-return]

    with pytest.raises(UnsupportedLayer, match="self-attention"):
        collect(Attend(), [torch.ones(2, 2, 8)], "input_mean", targets="layer.in_proj")


# Ties, reuse, adapted and quantised models ------------------------------------------------------------


class Reused(nn.Module):
    """A layer that is called twice, and one tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of three products with one weight."""
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))  # type: ignore[no-any-return]


def test_a_tied_weight_is_one_entry_and_all_its_uses_add_up(inputs_of: Record) -> None:
    torch.manual_seed(0)
    model, x = Reused().double(), torch.randn(5, 4, dtype=torch.float64)
    found = collect(model, [x], ["gradient", "input_gram"], loss=lambda m, b: m(b).pow(2).sum())
    assert list(found) == ["first"]
    assert found["second"] is found["first"]
    assert "second" in found
    gradient = torch.autograd.grad(model(x).pow(2).sum(), model.first.weight)[0]
    close(found["first"].get("gradient"), gradient)
    met = [p[0] for layer in (model.first, model.second) for p in inputs_of(model, layer, [x])]
    assert len(met) == 3
    rows = torch.cat(met)
    close(found["first"].get("input_gram"), rows.T @ rows / len(rows))
    assert found["first"].tokens == 15


def test_a_module_that_stands_in_the_model_twice_counts_once() -> None:
    shared = nn.Linear(3, 3).double()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    model.forward = lambda x: model["a"](x)  # type: ignore[method-assign]
    x = torch.randn(4, 3, dtype=torch.float64)
    found = collect(model, [x], "input_mean")
    assert found["a"].tokens == 4
    close(found["a"].get("input_mean"), x.mean(0))


@pytest.mark.parametrize("method", ["lora/pissa", "dora", "hira", "lora"])
def test_in_an_adapted_model_the_statistics_are_those_of_the_stored_weight(
    net: nn.Module, batches: list[Any], method: str
) -> None:
    plain = collect(net, batches, ["gradient", "input_gram", "output_mean"])
    rf.adapt(net, method, rank=2)
    flags = [p.requires_grad for p in net.parameters()]
    adapted = collect(net, batches, ["gradient", "input_gram", "output_mean"])
    for path in plain:  # every one of these starts as the base
        for name in ("gradient", "input_gram", "output_mean"):
            close(adapted[path].get(name), plain[path].get(name), 1e-5)
    assert flags == [p.requires_grad for p in net.parameters()]
    plain.check(net)


def quantised(form: str) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 64, bias=False)]
    if form == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        model = nn.Sequential(*layers)
        quantize_(model, Int8WeightOnlyConfig())
        return model
    import bitsandbytes as bnb

    for place in (0, 2):
        plain = layers[place]
        layer = bnb.nn.Linear4bit(
            plain.in_features, plain.out_features, plain.bias is not None, torch.float32, quant_type="nf4"
        )
        layer.load_state_dict(plain.state_dict())
        layers[place] = layer.to("cpu")
    return nn.Sequential(*layers)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_quantised_weight_has_the_gradient_of_its_matrix(form: str, adapted: bool) -> None:
    from rankfold.layers.foreign import dequantised

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quantised(form).train()
        x = torch.randn(5, 64)
        dense = [dequantised(model[i]).clone().requires_grad_() for i in (0, 2)]
        loss = F.linear(F.linear(x, dense[0], model[0].bias).tanh(), dense[1]).pow(2).sum()
        expected = torch.autograd.grad(loss, dense)
        if adapted:
            rf.adapt(model, "lora", rank=2)
        what = ["gradient", "sensitivity", "input_gram"]
        found = collect(model, [x], what, loss=lambda m, b: m(b).pow(2).sum())
    for path, gradient, matrix in zip(("0", "2"), expected, dense, strict=True):
        close(found[path].get("gradient"), gradient, 1e-3)
        torch.testing.assert_close(
            found[path].get("sensitivity"), (matrix * gradient).abs().sum().detach(), rtol=1e-3, atol=0
        )
    close(found["0"].get("input_gram"), x.T @ x / 5, 1e-5)
    assert all(module.training for module in model.modules())
    assert "forward" not in model[0].__dict__
    found.check(model)


def test_a_quantised_weight_has_no_second_derivative() -> None:
    with pytest.raises(UnsupportedLayer, match="second derivative"):
        collect(quantised("int8"), [torch.ones(1, 64)], "hessian_diagonal", loss=lambda m, b: m(b).sum())


def test_an_operation_without_a_second_derivative_is_named() -> None:
    model = rf.adapt(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "dora", rank=2)
    with pytest.raises(UnsupportedLayer, match=r"needs second derivatives.*use squared_gradient"):
        collect(model, [torch.ones(2, 4)], "hessian_diagonal", loss=lambda m, x: m(x).pow(2).sum())


def test_half_precision_is_summed_in_float32(net_of: Any, batches_of: Any) -> None:
    half = collect(net_of(torch.bfloat16), batches_of(3, torch.bfloat16), ["input_gram", "gradient"])
    for entry in half.values():
        assert entry.get("input_gram").dtype == entry.get("gradient").dtype == torch.float32
    model = nn.Sequential(nn.Linear(1, 1)).to(torch.bfloat16)
    many = [torch.full((1, 1), 0.5, dtype=torch.bfloat16)] * 600  # 0.25 is lost in a bfloat16 sum beyond 64
    found: Statistics = collect(model, many, "column_norm")
    assert float(found["0"].get("column_norm")) == pytest.approx((600 * 0.25) ** 0.5)


def test_a_transformers_model_is_collected_whole() -> None:
    import transformers as hf

    config = hf.BertConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(config).double()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {"input_ids": torch.randint(30, (2, 5)), "attention_mask": mask, "labels": torch.tensor([0, 2])}
    found = collect(model, [batch], ["input_gram", "gradient"])
    layer = "bert.encoder.layer.1"
    assert {entry.leader for path, entry in found.items() if "layer.1.attention.self" in path} == {
        f"{layer}.attention.self.query"
    }
    assert found[f"{layer}.intermediate.dense"].tokens == 8
    model.eval()
    hidden = model(**batch, output_hidden_states=True).hidden_states[1][mask.bool()].detach()
    close(found[f"{layer}.attention.self.key"].get("input_gram"), hidden.T @ hidden / 8, 1e-10)
    weight = model.get_submodule(f"{layer}.output.dense").weight
    gradient = torch.autograd.grad(model(**batch).loss, weight)[0]
    close(found[f"{layer}.output.dense"].get("gradient"), gradient, 1e-10)


def test_a_quantised_weight_counts_the_uses_that_have_a_gradient() -> None:
    model, x = quantised("int8"), torch.randn(5, 64)

    def loss(m: Any, batch: Tensor) -> Tensor:
        return m[0](batch).sum() + m[0](2 * batch).sum() + m[0](batch).detach().sum()  # type: ignore[no-any-return]

    found = collect(model, [x, x], ["gradient", "squared_gradient"], targets="0", loss=loss)["0"]
    expected = (3 * x.sum(0)).expand(32, 64)
    close(found.get("gradient"), expected, 1e-4)
    close(found.get("squared_gradient"), expected**2, 1e-3)


def test_convolutions_that_read_one_image_in_different_ways_share_nothing() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(2, 3, 3, stride=n, padding=1) for n in (1, 2, 1))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.a(x), self.b(x), self.c(x)]

    found = collect(Two(), [torch.randn(2, 2, 5, 5)], "input_gram", targets="convolutions")
    assert [entry.leader for entry in found.values()] == ["a", "b", "a"]
    assert [entry.tokens for entry in found.values()] == [50, 18, 50]


def test_dropout_is_off_inside_adapted_attention_too() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.MultiheadAttention(8, 2, dropout=0.5), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(x, x, x)[0])  # type: ignore[no-any-return]

    model, x = Attend().double().train(), torch.randn(3, 4, 8, dtype=torch.float64)
    plain = collect(model, [x], "input_mean", targets="last")["last"].get("input_mean")
    rf.adapt(model, "lora", rank=2, targets="layer.in_proj")
    model.train()
    close(collect(model, [x], "input_mean", targets="last")["last"].get("input_mean"), plain)
    assert model.layer.original.training


def test_layers_inside_torchs_own_encoder_are_seen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).double().eval()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    found = collect(model, [x], "input_mean", targets=["linear1", "linear2", "in_proj"])
    assert [entry.tokens for entry in found.values()] == [12, 12, 12]
    close(found["0.self_attn.in_proj"].get("input_mean"), x.mean((0, 1)))
