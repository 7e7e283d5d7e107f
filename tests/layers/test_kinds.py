"""Every kind of layer: the adapted layer is the plain layer with the expression's matrix in it."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from layers.models import Memory, adapted, perturb, seeded
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rankfold as rf
from rankfold.errors import UnsupportedLayer

METHODS = ("lora", "dora", "hira", "hra")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


IMAGES, WITH_PADDING = normal(2, 4, 7, 6), torch.tensor([[1, 2, 9], [2, 2, 3]])
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(6, 8), normal(2, 3, 6)),
    "linear of one vector": (lambda: nn.Linear(6, 8), normal(6)),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), normal(3, 6)),
    "transposed linear": (lambda: Conv1D(8, 6), normal(2, 3, 6)),
    "embedding": (lambda: nn.Embedding(10, 6), torch.tensor([[1, 2, 9], [0, 0, 3]])),
    "embedding with padding": (lambda: nn.Embedding(10, 6, padding_idx=2), WITH_PADDING),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), normal(2, 4, 9)),
    "conv1d same": (lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="replicate"), normal(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), padding=(1, 0), dilation=(1, 2)), IMAGES),
    "conv2d unbatched": (lambda: nn.Conv2d(4, 6, 3), normal(4, 7, 6)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular"), IMAGES),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=2, padding_mode="reflect"), IMAGES),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding="valid"), normal(1, 2, 3, 4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LAYERS)
def test_an_adapted_layer_equals_the_plain_layer_with_its_matrix(kind: str, method: str) -> None:
    build, x = LAYERS[kind]
    model = seeded(lambda: nn.Sequential(build())).double()
    x = x.double() if x.is_floating_point() else x
    before, plain, memory = model(x), copy.deepcopy(model), Memory(model)
    adapted(model, method, targets="0")
    with torch.no_grad():
        matrix = model[0].expression.dense()
        transposed = isinstance(plain[0], Conv1D)
        plain[0].weight.copy_((matrix.T if transposed else matrix).reshape(plain[0].weight.shape))
    after = model(x)
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after, plain(x))
    after.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    rf.remove(model)
    assert torch.equal(model(x), before)
    memory.check(model)


@pytest.mark.parametrize("kind", LAYERS)
def test_folding_leaves_a_plain_layer_with_the_same_output(kind: str) -> None:
    build, x = LAYERS[kind]
    model = adapted(seeded(lambda: nn.Sequential(build())), "dora", targets="0")
    after, original = model(x), model[0].original
    rf.fold(model)
    assert model[0] is original
    assert not hasattr(model[0], "adapters")
    torch.testing.assert_close(model(x), after, atol=1e-5, rtol=1e-4)
    assert all(p.requires_grad for p in model.parameters())


def test_the_padding_row_of_an_embedding_is_read_but_not_trained() -> None:
    model = adapted(seeded(lambda: nn.Sequential(nn.Embedding(10, 6, padding_idx=2))), targets="0")
    ids = torch.tensor([[1, 2, 2]])
    expected = model[0].expression.dense()[ids]
    torch.testing.assert_close(model(ids), expected)
    up = model[0].adapters["default"].leaf("up").tensor()
    model(ids).sum().backward()
    assert up.grad is not None
    assert up.grad[1].abs().sum() > 0
    assert up.grad[2].abs().sum() == 0


def test_an_adapted_layer_answers_for_its_original() -> None:
    model = adapted(
        seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.Linear(3, 5))), targets=["0", "1"]
    )
    assert (model[0].kernel_size, model[0].stride, model[0].in_channels) == ((3, 3), (2, 2), 4)
    assert (model[1].in_features, model[1].out_features) == (3, 5)
    with pytest.raises(AttributeError, match="no_such"):
        _ = model[1].no_such


# Attention --------------------------------------------------------------------------------------------


class Attends(nn.Module):
    """Self-attention under a name."""

    def __init__(self, **options: int | bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})

    def forward(self, x: Tensor) -> Tensor:
        context = x if self.attention.kdim == 8 else x[..., : self.attention.kdim]
        result: Tensor = self.attention(x, context, context, need_weights=False)[0]
        return result


@pytest.mark.parametrize("part", ["in_proj", "out_proj"])
@pytest.mark.parametrize("method", METHODS)
def test_projections_of_attention_are_adapted_folded_and_removed(part: str, method: str) -> None:
    model, x = seeded(Attends).double(), normal(2, 5, 8).double()
    before, plain, memory = model(x), copy.deepcopy(model), Memory(model)
    adapted(model, method, targets=f"attention.{part}")
    with torch.no_grad():
        stored = {"in_proj": plain.attention.in_proj_weight, "out_proj": plain.attention.out_proj.weight}
        stored[part].copy_(getattr(model.attention, part).expression.dense())
    after = model(x)
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after, plain(x))
    after.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    folded = rf.fold(copy.deepcopy(model))
    assert type(folded.attention) is nn.MultiheadAttention
    torch.testing.assert_close(folded(x), after)
    rf.remove(model)
    assert torch.equal(model(x), before)
    memory.check(model)


def test_attention_with_other_key_widths_has_its_output_projection_adapted() -> None:
    model, x = seeded(lambda: Attends(kdim=4, vdim=4)), normal(2, 5, 8)
    before = model(x)
    adapted(model, targets="attention")
    assert list(model.attention._modules) == ["adapters", "out_proj"]
    assert not torch.allclose(model(x), before, atol=1e-3)


def test_attention_refuses_dropout_of_the_input_of_its_change() -> None:
    with pytest.raises(
        UnsupportedLayer, match=r"attention\.in_proj reads its weight as a matrix.*use dropout=0"
    ):
        rf.adapt(seeded(Attends), "lora", rank=2, targets="attention", dropout=0.5)


def test_attention_leaves_its_own_dropout_off_in_evaluation() -> None:
    model, x = seeded(lambda: Attends(dropout=0.5)).train(), normal(2, 5, 8)
    adapted(model, targets="attention")
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_attention_that_was_planned_in_training_is_adapted_in_evaluation() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), Attends(dropout=0.5)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.second(self.first(x))
            return result

    model, x = seeded(Two).train(), normal(2, 5, 8)
    rf.adapt(model, "lora", rank=2, targets="first")
    rf.plan(model, "lora", rank=2, targets="attention", name="second")
    model.eval()
    rf.adapt(model, "lora", rank=2, targets="attention", name="second")
    assert torch.equal(model(x), model(x))
    assert not any(module.training for module in model.modules())


class Encodes(nn.Module):
    """A transformer encoder as torch has it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        result: Tensor = self.encoder(x, src_key_padding_mask=mask)
        return result


@pytest.mark.parametrize("targets", ["all-linear", "linear1", "linear2", "in_proj", "out_proj"])
def test_the_inference_path_of_an_encoder_does_not_drop_a_change(targets: str) -> None:
    model, x = seeded(Encodes), normal(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False, False, False, True, True]])
    memory = Memory(model)
    with torch.no_grad():
        before = model(x, mask)
    adapted(model, targets=targets)
    after = model(x, mask)
    assert not torch.allclose(after[~mask], before[~mask], atol=1e-3)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(model(x, mask)[~mask], after[~mask])
    rf.remove(model)
    with torch.no_grad():
        assert torch.equal(model(x, mask), before)
    memory.check(model)


# Refusals ---------------------------------------------------------------------------------------------


class Scaled(nn.Embedding):
    """An embedding that does something beside looking up."""

    def forward(self, ids: Tensor) -> Tensor:
        return 2 * super().forward(ids)


REFUSED = {
    "LSTM": (lambda: nn.LSTM(4, 4), "LSTM is no layer that can hold an expression"),
    "LayerNorm": (lambda: nn.LayerNorm(4), "LayerNorm is no layer"),
    "max_norm": (lambda: nn.Embedding(5, 4, max_norm=1.0), "Embedding has max_norm"),
    "own forward": (lambda: Scaled(5, 4), "Scaled has a forward of its own"),
    "lazy": (lambda: nn.LazyLinear(4), "LazyLinear has no shape yet"),
    "parametrised": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "computes its weight"),
    "transposed convolution": (lambda: nn.ConvTranspose1d(4, 4, 2), "ConvTranspose1d is no layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_hold_an_expression_is_refused_with_a_reason(case: str) -> None:
    build, sentence = REFUSED[case]
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "odd": build()})
    memory = Memory(model) if case != "lazy" else None
    with pytest.raises(UnsupportedLayer, match=f"'odd' matches odd, but .*{sentence}|{sentence}"):
        rf.adapt(model, "lora", rank=2, targets="odd")
    if memory is not None:
        memory.check(model)


def test_what_holds_layers_is_refused_with_the_names_of_those_inside() -> None:
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)})
    with pytest.raises(UnsupportedLayer, match=r"matches a, but .* inside it: a\.in_proj, a\.out_proj$"):
        rf.adapt(attention, "lora", rank=2, targets=["a"])
    many = nn.ModuleDict({"a": nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))})
    with pytest.raises(UnsupportedLayer, match=r"inside it: a\.0, a\.1, a\.2, a\.3, \.\.\.$"):
        rf.adapt(many, "lora", rank=2, targets=["a"])


def test_a_linear_subclass_with_its_own_forward_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, 2 * self.weight, self.bias)

    model, x = seeded(lambda: nn.Sequential(Doubled(6, 4))), normal(3, 6)
    before = model(x)
    adapted(model, targets="0")
    change = model[0].adapters["default"]
    difference = (change.leaf("up").tensor() @ change.leaf("down").tensor()).detach()
    torch.testing.assert_close(model(x), before + x @ difference.T)
    torch.testing.assert_close(model[0].matrix(), 2 * model[0].weight)
    with pytest.raises(UnsupportedLayer, match="no way is known to write a matrix as"):
        rf.fold(model, requantise=True)


def test_a_forward_that_was_set_on_a_layer_is_called_or_refused() -> None:
    model, x = seeded(lambda: nn.Sequential(nn.Linear(6, 4), nn.Conv1d(3, 3, 1))), normal(3, 6)
    model[0].forward = lambda x: F.linear(x, 2 * model[0].weight)
    adapted(model, targets="0")
    change = model[0].expression.leaf("up").tensor() @ model[0].expression.leaf("down").tensor()
    torch.testing.assert_close(model[0](x), x @ (2 * model[0].weight + change).T)
    model[1].forward = lambda x: 2 * x
    with pytest.raises(UnsupportedLayer, match="Conv1d has a forward of its own"):
        rf.adapt(model, "lora", rank=1, targets="1", name="second")


def test_a_layer_without_its_weight_is_refused() -> None:
    from accelerate import cpu_offload

    model = nn.Sequential(nn.Linear(4, 4))
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedLayer, match="Linear is offloaded and its weight is not there"):
        rf.adapt(model, "lora", rank=2, targets="0")


def test_a_copy_of_an_encoder_has_its_own_inference_path() -> None:
    model, x = adapted(seeded(Encodes)), normal(2, 5, 8)
    twin = copy.deepcopy(model)
    rf.remove(twin)
    assert twin.encoder.use_nested_tensor
    assert not any(len(m._forward_pre_hooks) for m in twin.modules())
    assert not model.encoder.use_nested_tensor
    after = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), after)


def test_one_adapter_holds_layers_of_every_kind() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 6), nn.Conv1d(5, 4, 3))
    adapted(model.eval(), targets=["0", "1", "2"])
    ids = torch.randint(10, (2, 5))
    model(ids).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    perturb(model)
    after = model(ids)
    torch.testing.assert_close(rf.fold(model)(ids), after, atol=1e-5, rtol=1e-4)
