"""How much memory a run will need, from counts alone."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

GIBIBYTE = 2**30
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Memory:
    """Predicted bytes of one training step.

    Args:
        weights: the base and the adapter.
        gradients: one number per trained parameter.
        optimizer: AdamW's two moments per trained parameter.
        activations: an estimate of what the forward pass keeps for the backward pass.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of the four."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def to_dict(self) -> dict[str, int]:
        """Return the four and their total, in bytes."""
        return {**asdict(self), "total": self.total}

    def __str__(self) -> str:
        """Return one line."""
        parts = [f"{name} {readable(value)}" for name, value in asdict(self).items()]
        return f"{readable(self.total)}: {', '.join(parts)} (estimated)"


def readable(count: int) -> str:
    """Return a number of bytes for a person.

    Example:
        >>> readable(3 * 2**30), readable(5 * 2**20)
        ('3.00 GiB', '5.0 MiB')
    """
    return f"{count / GIBIBYTE:.2f} GiB" if count >= GIBIBYTE else f"{count / MEBIBYTE:.1f} MiB"


def predict_memory(model: "nn.Module", trainable: int, tokens: int) -> Memory:
    """Predict the memory of a step on `tokens` tokens when `trainable` numbers train in float32.

    A transformer layer keeps about 8 values per hidden unit and 4 per unit of its wide part (inputs of the
    norms and projections, queries, keys, values, the gate and its product), in the dtype of the base; a
    language model also keeps its logits twice in float32. Attention scores are recomputed, not kept.

    Args:
        model: the base, before it is adapted.
        trainable: how many numbers train.
        tokens: examples of a batch times the tokens of the longest.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    weights = sum(tensor.nbytes for tensor in tensors.values())
    width = next(model.parameters()).element_size()
    return Memory(weights + 4 * trainable, 4 * trainable, 8 * trainable, activations(model, tokens, width))


def activations(model: "nn.Module", tokens: int, width: int, *, checkpointing: bool = False) -> int:
    """Estimate the bytes that a forward pass keeps; see `predict_memory`.

    Args:
        model: a transformer.
        tokens: of the batch.
        width: bytes of a number that is computed with.
        checkpointing: of every block but one, which is computed again, only the input is kept.
    """
    config: Any = getattr(model, "config", None)
    hidden = getattr(config, "hidden_size", 0)
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    blocks, block = getattr(config, "num_hidden_layers", 0), 8 * hidden + 4 * wide
    kept = tokens * (blocks * hidden + min(1, blocks) * block if checkpointing else blocks * block) * width
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return int(kept + (0 if head is None else 2 * 4 * tokens * head.weight.shape[0]))
