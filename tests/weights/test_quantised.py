import pytest
import torch
from torch import Tensor

from rankfold.linalg import NormalFloat, quantise
from rankfold.weights import Quantised, frozen, trained

FORM = NormalFloat(3, 16, 4, 8, "bf16")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantised(out: int = 48, columns: int = 32) -> Quantised:
    tensors = quantise(normal(out, columns), FORM)
    return Quantised(FORM, {name: frozen(value, name) for name, value in tensors.items()}, (out, columns))


def kept(weight: torch.nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward keeps for backward, without its input."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != x.data_ptr():
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        weight(x).sum()
    return sum(found.values())


def test_backward_keeps_the_codes_and_not_the_matrix() -> None:
    weight, x = quantised(), normal(5, 32, seed=1).requires_grad_()
    assert kept(weight, x) == weight.count().bytes < weight.dense().nbytes / 8
    change = trained(normal(48, 2, seed=2), "up") @ trained(normal(2, 32, seed=3), "down")
    assert kept(weight + change, x) < weight.dense().nbytes / 2


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_input_and_bias_get_the_gradients_of_the_matrix(leading: tuple[int, ...]) -> None:
    weight, x = quantised(), normal(*leading, 32, seed=1).requires_grad_()
    bias, probe = normal(48, seed=2).requires_grad_(), normal(*leading, 48, seed=3)
    found = torch.autograd.grad((weight(x, bias) * probe).sum(), [x, bias])
    wanted = torch.autograd.grad(((x @ weight.dense().T + bias) * probe).sum(), [x, bias])
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_nothing_of_it_trains_and_its_bytes_are_counted() -> None:
    weight = quantised()
    count = weight.count()
    assert not list(weight.parameters())
    assert (count.trainable, count.bytes) == (0, FORM.bytes(48 * 32))
    assert count.stored == sum(t.numel() for t in weight.state_dict().values())


def test_it_is_read_out_in_the_asked_precision_and_follows_a_move_to_another() -> None:
    weight = quantised()
    assert weight.dense().dtype == weight.bfloat16().dense().dtype == torch.float32
    assert weight.double().dense().dtype == torch.float64
    assert weight.leaf("codes").tensor().dtype == torch.uint8
