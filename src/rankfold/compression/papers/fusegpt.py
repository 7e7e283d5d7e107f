"""FuseGPT: the least important blocks go, and their weights go on in their neighbours.

    MI_i = 1 - mean_tokens cos(h, h without block i),   h the hidden states after the last block
    W_j' = W_j + B_j A_j + sum_k (C_jk D_jk) o W_k,   b_j' = b_j + sum_k c_jk o b_k      (o: entry by entry)
    min KL(softmax(h_group) || softmax(h'_group))

Pei et al. 2024. Again and again the block k of the smallest MI is taken out; every linear of the blocks
around it gets the weight W_k of its namesake in k, weighed entry by entry by coefficients of rank r, and a
change of rank r of its own. B_j = C_jk = c_jk = 0 at first, so that training starts at plain removal. Only
the group is trained: from the hidden states that enter it, to those that left it with the block inside. In
the end all is multiplied out: a stock model with fewer blocks. A product of rank r, entry by entry with W_k,
can have r times the rank of W_k.

A group is 7 blocks beside the removed one, r = 128, 20 epochs, Adam with betas (0.9, 0.95) and a cosine; 1e-3
for coefficients and 9.65e-6 for the rest (changes, norms). MI is read on the first 4 batches. The official
code's softmax runs over the batch, this one over the features, and no weight decay acts there either.
`keep` is a share of the blocks.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...errors import InvalidOption, UnsupportedLayer
from ...statistics.batches import Batch, prepared
from ...statistics.calibrating import Progress, calibrating
from ...statistics.finite import require_finite
from ..blocks import Calls, block_list, put_back, take_out, through, without
from ..job import refuse_adapted
from ..registry import compressor
from ..report import Row
from ..task import Task, refuse_half_precision

MEASURED = 4  # batches


@compressor(
    "fusegpt",
    title="FuseGPT: Learnable Layers Fusion of Generative Pre-trained Transformers",
    year=2024,
    arxiv="2411.14507",
    code="JarvisPei/FuseGPT",
    formula="W_j + B A + (C D) o W_k for the weights W_k of a block that is taken out",
    whole=True,
    targets="blocks",
    example={"epochs": 1, "rank": 2},
)
def fusegpt(
    task: Task,
    *,
    rank: int = 128,
    group: int = 7,
    epochs: int = 20,
    lr_coefficients: float = 1e-3,
    lr: float = 9.65e-6,
    fuse: bool = True,
) -> None:
    """Take blocks out until a share of them remains.

    Args:
        task: the model, `keep` as a share of its blocks, and calibration batches.
        rank: of changes and of coefficients, at least 1; capped where a weight is smaller.
        group: neighbours that take a block's weights over, at least 1.
        epochs: over the batches for every block, at least 0; 0 removes only.
        lr_coefficients: of C, D and c.
        lr: of B, A and the norms.
        fuse: let the removed weights go on; without, only B A is trained.

    Raises:
        UnsupportedLayer: the model has no list of blocks.

    Example:
        >>> import torch, transformers, rankfold as rf
        >>> sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 30}
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=3, **sizes))
        >>> data = [{"input_ids": torch.arange(16).reshape(2, 8)}]
        >>> len(rf.compress(model, "fusegpt", keep=0.7, data=data, epochs=1, progress=False).model.layers)
        2
    """
    if rank < 1 or group < 1 or epochs < 0:
        raise InvalidOption(
            f"fusegpt: rank and group must be at least 1 and epochs 0, not {rank}, {group} and {epochs}"
        )
    if task.targets != "blocks":
        raise InvalidOption("fusegpt takes whole blocks out; leave targets= away")
    refuse_adapted(task.model)
    if epochs:
        refuse_half_precision(task.model, "fusegpt")
    model, blocks = task.model, block_list(task.model)
    for name, parameter in model.named_parameters():
        require_finite(parameter.detach(), f"{name}: the weight")
    device = next(model.parameters()).device
    batches = [prepared(i, content, device, "padding") for i, content in enumerate(task.batches())]
    stay = max(1, int(task.keep * len(blocks) + 1e-9))
    before, config = deepcopy(blocks), deepcopy(getattr(model, "config", None))
    names = [f"block {index}" for index in range(len(blocks))]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    gone: dict[str, float] = {}
    try:
        with calibrating(model, []):
            for _ in range(len(blocks) - stay):
                influence = macro_influence(model, blocks, batches)
                index = min(range(len(blocks)), key=influence.__getitem__)
                gone[names.pop(index)] = influence[index]
                options = (rank, epochs, lr_coefficients, lr, fuse)
                _fuse(task, blocks, index, batches, group, options)
    except BaseException:
        put_back(blocks, list(before))
        if config is not None:
            model.config.__dict__.update(config.__dict__)
        raise
    for index, size in enumerate(sizes):
        name = f"block {index}"
        note = f"taken out, influence {gone[name]:.3g}" if name in gone else ""
        task.report.rows.append(Row(name, (1, size), None, 0 if name in gone else size, 0.0, 0.0, (), note))


@torch.no_grad()
def macro_influence(model: nn.Module, blocks: nn.ModuleList, batches: Sequence[Batch]) -> list[float]:
    """Return what every block changes in the hidden states after the last one, 1 minus the mean cosine.

    Args:
        model: in evaluation.
        blocks: of it.
        batches: the first 4 are read.
    """
    contents = [batch.content for batch in batches[:MEASURED]]
    after = Calls(model, blocks[-1], contents).outputs
    found = []
    for index in range(len(blocks)):
        with without(blocks, index):
            cut = Calls(model, blocks[-1], contents).outputs
        cosines = [F.cosine_similarity(a.float(), b.float(), dim=-1) for a, b in zip(after, cut, strict=True)]
        kept = [_counted(c, batch.mask) for c, batch in zip(cosines, batches, strict=False)]
        found.append(1 - float(torch.cat(kept).mean()))
    return found


def _counted(values: Tensor, mask: Tensor | None) -> Tensor:
    return values[mask] if mask is not None and mask.shape == values.shape else values.flatten()


def _fuse(
    task: Task,
    blocks: nn.ModuleList,
    index: int,
    batches: Sequence[Batch],
    group: int,
    options: tuple[int, int, float, float, bool],
) -> None:
    """Take a block out and train its neighbours to do what the group did."""
    first = min(max(0, index - group // 2), max(0, len(blocks) - 1 - group))
    members = list(blocks[first : first + group + 1])
    contents = [batch.content for batch in batches]
    entering, leaving = Calls(task.model, members[0], contents), Calls(task.model, members[-1], contents)
    removed = take_out(task.model, blocks, index)
    rest = [member for member in members if member is not removed]
    rank, epochs, lr_coefficients, lr, fuse = options
    if not epochs:
        return
    fused = {block: _grow(block, removed if fuse else None, rank, task.seed) for block in rest}
    norms = [p for block in rest for p in _others(block)]
    groups = [
        {"params": [p for f in fused.values() for m in f for p in m.coefficients()], "lr": lr_coefficients},
        {"params": [p for f in fused.values() for m in f for p in m.changes()] + norms, "lr": lr},
    ]
    try:
        _train(task, rest, entering, leaving.outputs, [b.mask for b in batches], groups, epochs)
    finally:
        for block in rest:
            _multiply_out(block)
            block.requires_grad_(False)


def _train(
    task: Task,
    blocks: Sequence[nn.Module],
    entering: Calls,
    aims: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    groups: list[dict[str, object]],
    epochs: int,
) -> None:
    """Let the group's output become what it was."""
    groups = [each for each in groups if each["params"]]
    parameters: list[nn.Parameter] = [p for each in groups for p in each["params"]]  # type: ignore[attr-defined]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    total = epochs * len(aims)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    bar = Progress(task.progress, total, "fusing")
    with torch.enable_grad():
        for _ in range(epochs):
            for (hidden, args, kwargs), aim, mask in zip(entering.inputs, aims, masks, strict=True):
                found = through(blocks, hidden, args, kwargs)
                loss = divergence(found, aim, mask)
                for parameter, gradient in zip(
                    parameters, torch.autograd.grad(loss, parameters), strict=True
                ):
                    parameter.grad = gradient
                optimizer.step()
                schedule.step()
                bar.step()
    bar.close()
    for parameter in parameters:
        parameter.grad = None


def divergence(found: Tensor, aim: Tensor, mask: Tensor | None) -> Tensor:
    """Return KL(softmax(aim) || softmax(found)) over the features, as a mean over the tokens that count."""
    each = F.kl_div(
        F.log_softmax(found.float(), -1), F.log_softmax(aim.float(), -1), reduction="none", log_target=True
    )
    return _counted(each.sum(-1), mask).mean()


class Fusion(nn.Module):
    """W + B A + (C D) o W_k, as a parametrisation of a weight (out, in); of a bias, b + c o b_k.

    Args:
        size: of what is parametrised.
        other: W_k or b_k, or None.
        rank: of the products.
        generator: of A and D.
    """

    def __init__(self, size: torch.Size, other: Tensor | None, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("other", None if other is None else other.detach())
        self.up = self.down = self.left = self.right = None
        if len(size) == 1:
            self.left = nn.Parameter(torch.zeros(size)) if other is not None else None
            return
        out, columns = size
        rank = min(rank, out, columns)
        self.up, self.down = nn.Parameter(torch.zeros(out, rank)), _uniform(rank, columns, generator)
        if other is not None:
            self.left, self.right = nn.Parameter(torch.zeros(out, rank)), _uniform(rank, columns, generator)

    def coefficients(self) -> list[nn.Parameter]:
        """Return C and D, or c."""
        return [p for p in (self.left, self.right) if p is not None]

    def changes(self) -> list[nn.Parameter]:
        """Return B and A."""
        return [p for p in (self.up, self.down) if p is not None]

    def forward(self, weight: Tensor) -> Tensor:
        """Return the fused weight."""
        found = weight if self.up is None or self.down is None else weight + (self.up @ self.down).to(weight)
        if self.left is None:
            return found
        coefficients = self.left if self.right is None else self.left @ self.right
        return found + coefficients.to(weight) * self.other  # type: ignore[operator]


def _uniform(rank: int, columns: int, generator: torch.Generator) -> nn.Parameter:
    """Return a factor (rank, columns) as `kaiming_uniform_` with a = sqrt(5) starts it."""
    return nn.Parameter((2 * torch.rand(rank, columns, generator=generator) - 1) / columns**0.5)


def _grow(block: nn.Module, removed: nn.Module | None, rank: int, seed: int) -> list[Fusion]:
    """Let every linear of a block grow by its namesake in the removed one."""
    generator, made = torch.Generator().manual_seed(seed), list[Fusion]()
    linears = _linears(block)
    if not linears:
        raise UnsupportedLayer(
            f"the blocks ({type(block).__name__}) hold no linear layers that could be fused"
        )
    others: Mapping[str, nn.Module] = {} if removed is None else _linears(removed)
    for name, linear in linears.items():
        for key in ("weight", "bias"):
            value, other = getattr(linear, key), getattr(others.get(name), key, None)
            if value is None or (key == "bias" and other is None):
                continue
            fusion = Fusion(value.shape, other, rank, generator).to(value.device)
            parametrize.register_parametrization(linear, key, fusion)
            made.append(fusion)
    return made


def _linears(block: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in block.named_modules() if _is_linear(module)}


def _is_linear(module: nn.Module) -> bool:
    """Return whether it is a linear layer, also one that stores its weight as (in, out) like GPT-2's."""
    kind = type(module).__mro__[1] if parametrize.is_parametrized(module) else type(module)
    transposed = kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
    return transposed or isinstance(module, nn.Linear)


def _others(block: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of a block that belong to no linear."""
    for module in block.modules():
        if not (parametrize.is_parametrized(module) or _is_linear(module) or isinstance(module, Fusion)):
            inside = parametrize.ParametrizationList
            if not isinstance(module, inside):
                yield from module.parameters(recurse=False)


def _multiply_out(block: nn.Module) -> None:
    for linear in _linears(block).values():
        for key in ("weight", "bias"):
            if parametrize.is_parametrized(linear, key):
                parametrize.remove_parametrizations(linear, key, leave_parametrized=True)
