"""Structured maps. Each takes leaves, not tensors, so that any source fits any structure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .blockwise import block_diagonal, block_gradients, kronecker, kronecker_gradients
from .kernels import reflect
from .op import LINEAR, Convolution, Op
from .thin import kronecker_linear, pays
from .weight import Leaf, Weight


class Diagonal(Weight):
    """diag(d) for a vector leaf of shape (n,)."""

    def __init__(self, vector: Leaf) -> None:
        super().__init__((vector.shape[0], vector.shape[0]))
        self.vector = vector

    def dense(self) -> Tensor:
        """Return the matrix, (n, n)."""
        return torch.diag(self.vector.tensor())

    def map(self, x: Tensor) -> Tensor:
        """Multiply channel by channel."""
        return x * self.vector.tensor().to(x.dtype)

    def entries(self) -> Iterator[tuple[Leaf, int]]:
        """Yield the vector, where it is trained."""
        if self.vector.trainable:
            yield self.vector, 0

    def macs(self, tokens: int) -> int:
        """Return tokens * n."""
        return tokens * self.shape[0]

    @property
    def T(self) -> Weight:
        """The map itself."""
        return self

    def formula(self) -> str:
        """Return diag(d) with its shape."""
        return f"diag({self.vector.formula()})"


class BlockDiagonal(Weight):
    """blockdiag(D_1, ..., D_N), cropped to (out, in), for a leaf of shape (N, rows, columns)."""

    def __init__(self, blocks: Leaf, shape: tuple[int, int] | None = None) -> None:
        count, rows, columns = blocks.shape
        super().__init__(shape or (count * rows, count * columns))
        self.blocks = blocks

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        blocks = self.blocks.tensor()
        count, rows, columns = blocks.shape
        grid = blocks.new_zeros(count, rows, count, columns)
        index = torch.arange(count, device=blocks.device)
        grid = grid.index_put(
            (index, torch.arange(rows, device=blocks.device)[:, None], index), blocks.transpose(0, 1)
        )
        return grid.reshape(count * rows, count * columns)[: self.shape[0], : self.shape[1]]

    def map(self, x: Tensor) -> Tensor:
        """Apply every block to its own channels."""
        return block_diagonal(x, self.blocks.tensor(), self.shape[0])

    def pull(self, x: Tensor, grad: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the blocks."""
        blocks = self.blocks.tensor()
        yield blocks, block_gradients(x, grad, blocks.shape)

    def macs(self, tokens: int) -> int:
        """Return tokens * numbers in the blocks, and making the blocks."""
        return tokens * math.prod(self.blocks.shape) + self.blocks.dense_macs()

    @property
    def T(self) -> Weight:
        """The transposed blocks."""
        return _TransposedBlocks(self)

    def formula(self) -> str:
        """Return blockdiag(D) with its shape."""
        return f"blockdiag({self.blocks.formula()})"


class _TransposedBlocks(Weight):
    def __init__(self, inner: BlockDiagonal) -> None:
        super().__init__((inner.shape[1], inner.shape[0]))
        self.inner = inner

    def dense(self) -> Tensor:
        return self.inner.dense().T

    def map(self, x: Tensor) -> Tensor:
        return block_diagonal(x, self.inner.blocks.tensor().mT, self.shape[0])

    def macs(self, tokens: int) -> int:
        return self.inner.macs(tokens)

    @property
    def T(self) -> Weight:
        return self.inner

    def formula(self) -> str:
        return f"{self.inner.formula()}^T"


class Grid(Weight):
    """k x k blocks of rank q: block (j, n) is `up[j, :, n q:(n+1) q] @ down[n, j q:(j+1) q, :]`.

    Args:
        up: leaf (k, out / k, k q).
        down: leaf (k, k q, in / k).
    """

    def __init__(self, up: Leaf, down: Leaf) -> None:
        count = up.shape[0]
        super().__init__((count * up.shape[1], count * down.shape[2]))
        self.up, self.down, self.grid = up, down, count

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        up = self.up.tensor().unflatten(2, (self.grid, -1))
        down = self.down.tensor().unflatten(1, (self.grid, -1))
        return torch.einsum("jonq,njqi->joni", up, down).reshape(self.shape)

    def map(self, x: Tensor) -> Tensor:
        """Apply all blocks in two batched products around an exchange of the two block axes."""
        k, flat = self.grid, x.reshape(-1, x.shape[-1])
        inner = torch.bmm(flat.unflatten(-1, (k, -1)).transpose(0, 1), self.down.tensor().to(x.dtype).mT)
        inner = inner.unflatten(-1, (k, -1)).permute(2, 1, 0, 3).flatten(2)
        y = torch.bmm(inner, self.up.tensor().to(x.dtype).mT)
        return y.transpose(0, 1).reshape(*x.shape[:-1], self.shape[0])

    def sides(self) -> Iterator[tuple[Leaf, str]]:
        """Yield the trained ones of the two leaves."""
        ends = ((self.up, "output"), (self.down, "input"))
        yield from ((leaf, side) for leaf, side in ends if leaf.trainable)

    def macs(self, tokens: int) -> int:
        """Return tokens * k q * (out + in) / k, a plain product's at the same parameter count."""
        return tokens * (math.prod(self.up.shape) + math.prod(self.down.shape))

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming every block."""
        return math.prod(self.shape) * self.up.shape[2] // self.grid

    def formula(self) -> str:
        """Return grid(up, down) with shapes."""
        return f"grid({self.up.formula()} @ {self.down.formula()})"


class Sparse(Weight):
    """A matrix with a fixed support: entry (rows[i], columns[i]) is values[i].

    Args:
        values: leaf (n,).
        rows, columns: (n,) integer positions, no pair twice.
        shape: (out, in).
    """

    rows_index: Tensor
    columns_index: Tensor

    def __init__(self, values: Leaf, rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        self.values = values
        self.register_buffer("rows_index", rows, persistent=False)
        self.register_buffer("columns_index", columns, persistent=False)

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        values = self.values.tensor()
        return values.new_zeros(self.shape).index_put((self.rows_index, self.columns_index), values)

    def map(self, x: Tensor) -> Tensor:
        """Gather, multiply and add where the support is thin; through the matrix elsewhere."""
        if self.values.shape[0] * 16 > math.prod(self.shape):
            return super().map(x)
        products = x[..., self.columns_index] * self.values.tensor().to(x.dtype)
        return x.new_zeros(*x.shape[:-1], self.shape[0]).index_add(-1, self.rows_index, products)

    def macs(self, tokens: int) -> int:
        """Return tokens * entries of the support."""
        return tokens * self.values.shape[0]

    @property
    def T(self) -> Weight:
        """The transposed map on the same values."""
        return Sparse(self.values, self.columns_index, self.rows_index, (self.shape[1], self.shape[0]))

    def formula(self) -> str:
        """Return sparse(values) with the shape."""
        return f"sparse({self.values.formula()}, {self.shape[0]}x{self.shape[1]})"


class Select(Weight):
    """Rows of the identity: output i is input index[i]. Its transpose scatters.

    Args:
        index: (out,) integer positions.
        size: number of inputs.
    """

    index: Tensor

    def __init__(self, index: Tensor, size: int) -> None:
        super().__init__((index.shape[0], size))
        self.register_buffer("index", index, persistent=False)

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        return F.one_hot(self.index, self.shape[1]).to(torch.get_default_dtype())

    def map(self, x: Tensor) -> Tensor:
        """Take the selected channels."""
        return x[..., self.index]

    def macs(self, tokens: int) -> int:
        """Return 0: nothing is multiplied."""
        return 0

    @property
    def T(self) -> Weight:
        """The map that adds every channel to the place it was taken from."""
        return _Scatter(self)

    def formula(self) -> str:
        """Return select with the shape."""
        return f"select[{self.shape[0]}x{self.shape[1]}]"


class _Scatter(Weight):
    def __init__(self, select: Select) -> None:
        super().__init__((select.shape[1], select.shape[0]))
        self.select = select

    def dense(self) -> Tensor:
        return self.select.dense().T

    def map(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.shape[0]).index_add(-1, self.select.index, x)

    def macs(self, tokens: int) -> int:
        return 0

    @property
    def T(self) -> Weight:
        return self.select

    def formula(self) -> str:
        return f"{self.select.formula()}^T"


class Permutation(Select):
    """A permutation: output i is input index[i]; its transpose is its inverse."""

    def __init__(self, index: Tensor) -> None:
        super().__init__(index, index.shape[0])

    @property
    def T(self) -> Weight:
        """The inverse permutation."""
        return Permutation(torch.argsort(self.index))

    def formula(self) -> str:
        """Return permute with the size."""
        return f"permute[{self.shape[0]}]"


class Reflections(Weight):
    """A product of Householder reflections, H = (I - 2 v_1 v_1^T) ... (I - 2 v_r v_r^T), v_i = u_i / ||u_i||.

    Held in the compact form H = I - V T V^T with T upper triangular, T^-1 = I/2 + strict_upper(V^T V).

    Args:
        vectors: leaf (n, r) whose columns are the u_i, none of them zero.
    """

    def __init__(self, vectors: Leaf) -> None:
        super().__init__((vectors.shape[0], vectors.shape[0]))
        self.vectors = vectors

    def compact(self) -> tuple[Tensor, Tensor]:
        """Return V (n, r) with unit columns and the upper triangular T (r, r), float32 or better."""
        vectors = self.vectors.tensor()
        vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
        unit = vectors / torch.linalg.vector_norm(vectors, dim=0)
        identity = torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device)
        inverse = torch.triu(unit.T @ unit, 1) + identity / 2
        return unit, torch.linalg.solve_triangular(inverse, identity, upper=True)

    def dense(self) -> Tensor:
        """Return the matrix, (n, n)."""
        unit, core = self.compact()
        return torch.eye(unit.shape[0], dtype=unit.dtype, device=unit.device) - unit @ core @ unit.T

    def map(self, x: Tensor) -> Tensor:
        """Apply I - V T V^T in two thin products."""
        return reflect(x, *self.compact())

    def entries(self) -> Iterator[tuple[Leaf, int]]:
        """Yield the vectors, whose rows are the channels."""
        if self.vectors.trainable:
            yield self.vectors, 0

    def macs(self, tokens: int) -> int:
        """Return tokens * (2 n r + r^2), and n r^2 for V^T V."""
        size, rank = self.vectors.shape
        return tokens * (2 * size * rank + rank * rank) + size * rank * rank

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming the matrix."""
        return self.shape[0] ** 2 * self.vectors.shape[1]

    @property
    def T(self) -> Weight:
        """The inverse: the same reflections in the opposite order."""
        return _Inverse(self)

    def formula(self) -> str:
        """Return reflections(u) with shapes."""
        return f"reflections({self.vectors.formula()})"


class _Inverse(Weight):
    def __init__(self, inner: Reflections) -> None:
        super().__init__(inner.shape)
        self.inner = inner

    def dense(self) -> Tensor:
        return self.inner.dense().T

    def map(self, x: Tensor) -> Tensor:
        unit, core = self.inner.compact()
        return reflect(x, unit, core.T)

    def macs(self, tokens: int) -> int:
        return self.inner.macs(tokens)

    @property
    def T(self) -> Weight:
        return self.inner

    def formula(self) -> str:
        return f"{self.inner.formula()}^T"


class Kronecker(Weight):
    """The Kronecker product of two maps, applied as `A X B^T` on the reshaped input, never formed."""

    def __init__(self, left: Weight, right: Weight) -> None:
        super().__init__((left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]))
        self.left, self.right = left, right

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        left, right = self.left.dense(), self.right.dense()
        return (left[:, None, :, None] * right[None, :, None, :]).reshape(self.shape)

    def nested(self) -> bool:
        """Say whether one of the two maps is a Kronecker product itself."""
        return any(isinstance(m, Kronecker) for side in (self.left, self.right) for m in side.modules())

    def map(self, x: Tensor) -> Tensor:
        """Apply the right map to the inner axis and the left map to the outer one."""
        if not self.nested():
            return kronecker(x, self.left.dense(), self.right.dense())
        y = self.right(x.unflatten(-1, (self.left.shape[1], self.right.shape[1])))
        left: Tensor = self.left(y.mT)
        return left.mT.flatten(-2)

    def pull(self, x: Tensor, grad: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the two matrices, unless they are products themselves."""
        if self.nested():
            yield from super().pull(x, grad)
        else:
            made = self.left.dense(), self.right.dense()
            yield from zip(made, kronecker_gradients(x, grad, *(m.detach() for m in made)), strict=True)

    def added(self, x: Tensor, base: Tensor, bias: Tensor | None, scale: float = 1.0) -> Tensor | None:
        """Return `x @ (base + scale matrix).T + bias` through the matrix, or None where that does not pay."""
        forming = self.dense_macs() + math.prod(self.shape)
        if base.dtype != x.dtype or not pays(x, forming, self.macs(LINEAR.tokens(x))):
            return None
        left, right = (factor.dense().to(x.dtype) for factor in (self.left, self.right))
        return kronecker_linear(x, base, bias, scale * left, right)

    def macs(self, tokens: int) -> int:
        """Return the multiply-adds of the two maps on their slices, as matrices unless they are products."""
        if not self.nested():
            (a, b), (c, d) = self.left.shape, self.right.shape
            return tokens * b * c * (a + d) + self.left.dense_macs() + self.right.dense_macs()
        return self.right.macs(tokens * self.left.shape[1]) + self.left.macs(tokens * self.right.shape[0])

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming the matrix."""
        return math.prod(self.shape) + self.left.dense_macs() + self.right.dense_macs()

    @property
    def T(self) -> Weight:
        """The Kronecker product of the transposes."""
        return Kronecker(self.left.T, self.right.T)

    def formula(self) -> str:
        """Return kron(A, B) with shapes."""
        return f"kron({self.left.formula()}, {self.right.formula()})"


class Tucker(Weight):
    """A Tucker tensor on a kernel's own dimensions, `G x_1 U_out x_2 U_in x_3 U_h ...`, as a matrix.

    Args:
        core: leaf (r_out, r_in, r_1, ..., r_d); d = 0 for a linear layer.
        factors: leaves (out, r_out), (in, r_in) and one (size, rank) per window axis.
    """

    factors: Sequence[Leaf]

    def __init__(self, core: Leaf, factors: Sequence[Leaf]) -> None:
        columns = math.prod(f.shape[0] for f in factors[1:])
        super().__init__((factors[0].shape[0], columns))
        self.core = core
        self.factors = torch.nn.ModuleList(factors)  # type: ignore[assignment]  # a registered sequence

    def kernel(self) -> Tensor:
        """Return the core with its window axes at full size: (r_out, r_in, *window)."""
        kernel = self.core.tensor()
        for factor in list(self.factors)[2:]:
            kernel = torch.tensordot(kernel, factor.tensor(), ([2], [1]))
        return kernel

    def sides(self) -> Iterator[tuple[Leaf, str]]:
        """Yield the trained ones of the two channel factors."""
        ends = zip(list(self.factors)[:2], ("output", "input"), strict=True)
        yield from ((leaf, side) for leaf, side in ends if leaf.trainable)

    def ends(self) -> tuple[Tensor, Tensor]:
        """Return the two channel factors, (out, r_out) and (in, r_in)."""
        return self.factors[0].tensor(), self.factors[1].tensor()

    def factored(self) -> tuple[Tensor, Tensor]:
        """Return up (out, r_out) and down (r_out, in * window), whose product is the matrix."""
        up, inputs = self.ends()
        down = torch.tensordot(self.kernel(), inputs, ([1], [1])).movedim(-1, 1)
        return up, down.flatten(1)

    def dense(self) -> Tensor:
        """Return the matrix, (out, in * window)."""
        up, down = self.factored()
        return up @ down

    def forward(self, x: Tensor, bias: Tensor | None = None, op: Op = LINEAR) -> Tensor:
        """Convolve between the two channel mixes: 1x1, small kernel, 1x1."""
        if not isinstance(op, Convolution) or op.groups > 1:
            return op.add(op.low_rank(x, *(t.to(x.dtype) for t in self.factored())), bias)
        up, inputs = (t.to(x.dtype) for t in self.ends())
        y = op.apply(op.pointwise(x, inputs.T), self.kernel().to(x.dtype).flatten(1))
        return op.add(op.pointwise(y, up), bias)

    def map(self, x: Tensor) -> Tensor:
        """Apply the factors to the last axis."""
        return self.forward(x)

    def small_rank(self) -> int | None:
        """Return r_out; None for a kernel, where a single pair would mix all channels at every place."""
        return self.core.shape[0] if len(self.factors) == 2 else None

    def macs(self, tokens: int) -> int:
        """Return tokens * (in r_in + r_in r_out window + r_out out) on channels."""
        (out, r_out), (inputs, r_in) = self.factors[0].shape, self.factors[1].shape
        window = self.shape[1] // inputs
        return tokens * (inputs * r_in + r_in * r_out * window + r_out * out)

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming the matrix."""
        return math.prod(self.shape) * self.core.shape[0]

    def formula(self) -> str:
        """Return tucker(core; factors) with shapes."""
        return f"tucker({self.core.formula()}; {', '.join(f.formula() for f in self.factors)})"


class TensorTrain(Weight):
    """A tensor train over the digits of the output index, then of the input index.

        W[(o_1..o_p), (i_1..i_q)] = C_1[:, o_1, :] ... C_p[:, o_p, :] C_p+1[:, i_1, :] ... C_p+q[:, i_q, :]

    Args:
        cores: leaves (r_{k-1}, n_k, r_k) with r_0 = r_{p+q} = 1.
        outputs: p, the number of cores that carry the output index.
    """

    cores: Sequence[Leaf]

    def __init__(self, cores: Sequence[Leaf], outputs: int) -> None:
        sizes = [core.shape[1] for core in cores]
        super().__init__((math.prod(sizes[:outputs]), math.prod(sizes[outputs:])))
        self.outputs = outputs
        self.cores = torch.nn.ModuleList(cores)  # type: ignore[assignment]  # a registered sequence

    def factored(self) -> tuple[Tensor, Tensor]:
        """Return the two halves of the train, (out, r_p) and (r_p, in)."""
        tensors = [core.tensor() for core in self.cores]
        left, right = tensors[0], tensors[-1]
        for core in tensors[1 : self.outputs]:
            left = (left.flatten(0, 1) @ core.flatten(1)).reshape(1, -1, core.shape[2])
        for core in reversed(tensors[self.outputs : -1]):
            right = (core.flatten(0, 1) @ right.flatten(1)).reshape(core.shape[0], -1, 1)
        return left.reshape(self.shape[0], -1), right.reshape(-1, self.shape[1])

    def dense(self) -> Tensor:
        """Return the matrix, (out, in)."""
        up, down = self.factored()
        return up @ down

    def map(self, x: Tensor) -> Tensor:
        """Apply the two halves."""
        return LINEAR.low_rank(x, *(t.to(x.dtype) for t in self.factored()))

    def small_rank(self) -> int:
        """Return the rank of the small form."""
        return self.cores[self.outputs].shape[0]

    def macs(self, tokens: int) -> int:
        """Return tokens * middle rank * (out + in), and forming the two halves."""
        halves = self._forming(list(self.cores)[: self.outputs])
        halves += self._forming(list(self.cores)[: self.outputs - 1 : -1])
        return tokens * self.cores[self.outputs].shape[0] * sum(self.shape) + halves

    @staticmethod
    def _forming(cores: list[Leaf]) -> int:
        """Return the multiply-adds of contracting cores, from the end of the train inwards."""
        total, rows = 0, cores[0].shape[1]
        for core in cores[1:]:
            total, rows = total + rows * math.prod(core.shape), rows * core.shape[1]
        return total

    def dense_macs(self) -> int:
        """Return the multiply-adds of forming the matrix from its halves."""
        return math.prod(self.shape) * self.cores[self.outputs].shape[0]

    def formula(self) -> str:
        """Return train(cores) with shapes."""
        return f"train({', '.join(core.formula() for core in self.cores)})"
