"""Outer factors around a core, ordered products, whole columns and activations: what the laws do not say."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from rankfold import weights as w
from rankfold.errors import NotDense
from rankfold.weights import adopt_selections, frozen, trained


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectral(core: Tensor, columns: int = 8) -> w.Spectral:
    rank = core.shape[0]
    left, right = trained(normal(6, rank), "left"), trained(normal(rank, columns, seed=1), "right")
    return w.Spectral(left, trained(core, "core"), right)


CORES = [normal(3, seed=2), normal(3, 3, seed=2), torch.zeros(3, 3).double()]
WINDOW = w.Convolution((2,), (1,), (0,), (1,), groups=2)


@pytest.mark.parametrize("core", CORES, ids=["diagonal", "square", "zero"])
@pytest.mark.parametrize("way", ["applied", "matrix", "convolution"])
def test_outer_factors_get_the_gradients_of_a_core_that_is_not_there(core: Tensor, way: str) -> None:
    weight, full = spectral(core), core if core.dim() == 2 else torch.diag(core)
    x = normal(5, 8, seed=3) if way != "convolution" else normal(2, 8, 5, seed=3)
    op = WINDOW if way == "convolution" else w.LINEAR
    probe = weight.dense().detach().requires_grad_()
    wanted = op.apply(x, probe)
    output = weight(x, op=op) if way != "matrix" else x @ weight.dense().T
    torch.testing.assert_close(output, wanted)
    cotangent = normal(*wanted.shape, seed=4)
    (gradient,) = torch.autograd.grad((wanted * cotangent).sum(), probe)
    (output * cotangent).sum().backward()
    left, inner, right = (leaf.tensor() for leaf in (weight.left, weight.core, weight.right))
    torch.testing.assert_close(left.grad, gradient @ right.T)
    torch.testing.assert_close(right.grad, left.T @ gradient)
    own = left.T @ gradient @ right.T
    torch.testing.assert_close(inner.grad, own if core.dim() == 2 else own.diagonal())
    assert full.shape == own.shape


def test_the_input_gets_the_gradient_of_the_whole_weight() -> None:
    weight, x = spectral(normal(3, 3, seed=2)), normal(5, 8, seed=3).requires_grad_()
    cotangent = normal(5, 6, seed=4)
    (gradient,) = torch.autograd.grad((weight(x) * cotangent).sum(), x)
    torch.testing.assert_close(gradient, cotangent @ weight.dense().detach())


def test_frozen_outer_factors_keep_no_input_for_backward() -> None:
    left, right = frozen(normal(6, 3), "left"), frozen(normal(3, 8, seed=1), "right")
    weight = w.Spectral(left, trained(normal(3), "core"), right)
    x, kept = normal(50, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        weight(x)
    assert (50, 8) not in kept
    assert (50, 3) in kept


def test_evaluation_takes_two_matrices_and_follows_a_vector_that_another_part_holds() -> None:
    values = trained(normal(5).abs(), "values")
    parts = [
        w.Spectral(
            frozen(normal(6, n, seed=n), f"left{n}"),
            w.Sliced(values, start, start + n, f"values{n}", holds=holds),
            frozen(normal(n, 8, seed=n), f"right{n}"),
        )
        for start, n, holds in ((0, 2, True), (2, 3, False))
    ]
    assert [len(list(part.parameters())) for part in parts] == [1, 0]
    x = normal(4, 8)
    with torch.no_grad():
        before = parts[1](x)
        values.value[2:] *= 3
        torch.testing.assert_close(parts[1](x), 3 * before)
    whole = parts[0] + parts[1]
    for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):  # noqa: S301 - our own bytes
        with torch.no_grad():
            next(twin.parameters()).zero_()
        assert not twin(x).any()
    assert whole(x).any()


def test_sizes_of_a_file_are_taken_and_others_left() -> None:
    for weight, names in (
        (spectral(normal(3, 3)), {"left": (6, 2), "core": (2, 2), "right": (2, 8)}),
        (spectral(normal(3)), {"left": (6, 2), "core": (2,), "right": (2, 8)}),
        (
            w.Ordered(trained(normal(6, 3), "up"), trained(normal(3, 8), "down")),
            {"up": (6, 2), "down": (2, 8)},
        ),
    ):
        shapes = {name: torch.zeros(shape) for name, shape in names.items()}
        before = [tuple(p.shape) for p in weight.parameters()]
        adopt_selections(weight, {**shapes, next(iter(names)): torch.zeros(6, 4)})  # they do not fit together
        adopt_selections(weight, {name: shapes[name] for name in list(shapes)[1:]})
        assert [tuple(p.shape) for p in weight.parameters()] == before
        adopt_selections(weight, shapes)
        assert {leaf.name: leaf.shape for leaf in weight.leaves()} == names
        assert weight(normal(4, 8)).shape == (4, 6)


def test_a_product_is_cut_while_it_trains_and_lets_go_of_its_last_terms() -> None:
    up, down, x = normal(6, 4), normal(4, 8), normal(3, 8)
    weight = w.Ordered(trained(up, "up"), trained(down, "down")).train()
    weight.cut(1)
    torch.testing.assert_close(weight(x), x @ (up[:, :1] @ down[:1]).T)
    weight.take_whole(True)
    torch.testing.assert_close(weight(x), x @ (up @ down).T)
    weight.take_whole(False)
    torch.testing.assert_close(weight.eval()(x), x @ (up @ down).T)
    weight.train().keep_first(3)
    torch.testing.assert_close(weight(x), x @ (up[:, :3] @ down[:3]).T)
    assert (weight.width, weight.mask, list(weight.pairs())) == (3, None, [])


def test_what_was_cut_in_forward_is_cut_so_in_backward() -> None:
    weight = w.Ordered(trained(normal(6, 4), "up"), trained(normal(4, 8), "down")).train()
    weight.cut(1)
    output = weight(normal(200, 8))
    weight.take_whole(True)
    output.sum().backward()
    assert not weight.leaf("up").tensor().grad[:, 1:].any()  # type: ignore[index]


def test_an_activation_between_factors_leaves_no_matrix() -> None:
    weight = w.Activated(trained(normal(6, 2), "up"), trained(normal(2, 8), "down"), "relu")
    x = normal(5, 8)
    torch.testing.assert_close(weight(x), (x @ normal(2, 8).T).relu() @ normal(6, 2).T)
    for broken in (weight, weight.T, 2.0 * weight):
        with pytest.raises(NotDense, match="relu between its factors"):
            broken.dense()
    assert not (weight + frozen(normal(6, 8))).has_matrix()
    assert weight.formula() == "up*[6x2] relu(down*[2x8] x)"


def test_columns_keep_their_own_channels_for_backward_only() -> None:
    index = frozen(torch.tensor([1, 4], dtype=torch.int32), "index")
    weight, kept = w.Channels(trained(normal(6, 2), "values"), index, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        weight(normal(50, 8))
    assert (50, 2) in kept
    assert (50, 8) not in kept
    assert weight.macs(50) == 50 * 6 * 2
