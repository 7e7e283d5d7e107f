"""The model of Outlier-Safe Pre-Training: norms with one gain, and projections beside the embeddings.

    norm:  y = gamma x / sqrt(mean(x^2) + eps),   gamma one number
    h_0 = R_1 E[token],   logits = U R_2 norm(h_L),   R_1, R_2 (d, d) trained, orthogonal at the start

Park et al. 2025 (arXiv 2506.19697). Gains per channel and the coordinates in which embeddings are learnt
single out channels, which then grow outliers; neither is left here. A norm with one gain commutes with
every rotation. The optimizer of the paper is `rankfold.optim.muon`. `outlier_safe` changes a model that is
about to be trained from scratch, `fold_outlier_safe` turns it into a stock model again: R_1 goes into E,
R_2 into U, and the gain into a constant vector. Start: norms of equal gains that centre nothing keep what
they compute; the projections make another model.

Deviations: norms that centre (LayerNorm) no longer do, and have no bias. Tied tables are projected apart,
so they are untied by folding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import NotAdapted, UnknownTarget
from ...layers.targets import output_heads
from ..seeds import hashed
from ..single_scale import SingleScaleNorm, single_scale_norms


def outlier_safe(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a model norms with one gain and projections beside its embeddings, in place.

    Args:
        model: about to be trained from scratch.
        seed: of the projections.

    Returns:
        The model.

    Raises:
        UnknownTarget: the model has no embedding or no head.

    Example:
        >>> parts = {"embed": nn.Embedding(9, 4), "norm": nn.RMSNorm(4), "lm_head": nn.Linear(4, 9)}
        >>> model = outlier_safe(nn.ModuleDict(parts))
        >>> [name for name, _ in model.named_parameters() if "projection" in name]
        ['embed.projection.weight', 'lm_head.projection.weight']
    """
    project_embeddings(model, seed)
    return single_scale_norms(model)


def project_embeddings(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a model's embedding and head a trained projection each, orthogonal at the start, in place.

    They are called `projection`, below the layers, whose own tables keep their names.

    Args:
        model: whose `get_input_embeddings` or first embedding, and whose output head, are meant.
        seed: of the projections.

    Raises:
        UnknownTarget: the model has no embedding or no head.

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "lm_head": nn.Linear(4, 9)})
        >>> matrix = project_embeddings(model)["embed"].projection.weight
        >>> torch.allclose(matrix @ matrix.T, torch.eye(4), atol=1e-6)
        True
    """
    embedding, head = _ends(model)
    for layer, name, width in (
        (embedding, "embedding", embedding.embedding_dim),
        (head, "head", head.in_features),
    ):
        matrix = torch.empty(width, width)
        generator = torch.Generator().manual_seed(hashed(seed, "projection", name))
        nn.init.orthogonal_(matrix, generator=generator)
        layer.projection = nn.Linear(width, width, bias=False)
        layer.projection.weight = nn.Parameter(matrix.to(layer.weight))
    embedding.register_forward_hook(_project_output)
    head.register_forward_pre_hook(_project_input)
    return model


def _project_output(layer: Any, inputs: Any, output: Tensor) -> Tensor:
    projected: Tensor = layer.projection(output)
    return projected


def _project_input(layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (layer.projection(inputs[0]), *inputs[1:])


@torch.no_grad()
def fold_outlier_safe(model: nn.Module) -> nn.Module:
    """Turn a model that `outlier_safe` changed into a stock one that computes the same, in place.

        E <- E R_1^T,   U <- U R_2

    Returns:
        The model.

    Raises:
        NotAdapted: it has neither such norms nor projections.

    Example:
        >>> parts = {"embed": nn.Embedding(9, 4), "norm": nn.RMSNorm(4), "lm_head": nn.Linear(4, 9)}
        >>> [type(part).__name__ for part in fold_outlier_safe(outlier_safe(nn.ModuleDict(parts))).values()]
        ['Embedding', 'RMSNorm', 'Linear']
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "projection", None), nn.Linear)]
    layers = [layer for layer in layers if isinstance(layer, nn.Embedding | nn.Linear)]
    norms = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, SingleScaleNorm)
    ]
    if not layers and not norms:
        raise NotAdapted("the model has no norms with one gain and no projections beside its embeddings")
    untied = len({id(layer.weight) for layer in layers}) < len(layers)
    for layer in layers:
        matrix = layer.projection.weight
        right = matrix.T if isinstance(layer, nn.Embedding) else matrix
        layer.weight = nn.Parameter(layer.weight @ right, layer.weight.requires_grad)
        _unproject(layer)
    config: Any = getattr(model, "config", None)
    if untied and hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = False
    for parent, name, norm in norms:
        setattr(parent, name, norm.stock())
    return model


def _unproject(layer: Any) -> None:
    del layer.projection
    for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_project_output, _project_input)]:
            del hooks[key]


def excess_kurtosis(activations: Tensor) -> float:
    """Return E[(x - mean)^4] / var^2 - 3 of all entries, near 0 where no channel has outliers.

    Example:
        >>> excess_kurtosis(torch.tensor([1.0, -1.0]))
        -2.0
    """
    centred = activations.double() - activations.double().mean()
    return float(centred.pow(4).mean() / centred.square().mean().square()) - 3.0


def _ends(model: Any) -> tuple[Any, Any]:
    """Return the embedding and the head."""
    getter = getattr(model, "get_input_embeddings", None)
    found = getter() if callable(getter) else None
    embedding = found or next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    heads = output_heads(model)
    head = next((m for path, m in model.named_modules() if path in heads and isinstance(m, nn.Linear)), None)
    for what, layer in (("embedding", embedding), ("linear output head", head)):
        if layer is None:
            raise UnknownTarget(f"{type(model).__name__} has no {what} to put a projection beside")
    return embedding, head
