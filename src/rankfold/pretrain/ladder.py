"""Llama-shaped models by name, from a tenth of a million parameters to seven billion.

From 60M on they are the models of the literature on memory-efficient pretraining (ReLoRA, GaLore, SLTrain and
what followed): 32,000 tokens, untied embeddings, feed-forward blocks of about 8/3 of the width. The smaller
ones go on downwards in the same shape, with vocabularies that little text supports, and heads of 16 (0.1M,
0.3M), 32 (to 10M) or 64 numbers.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankfold.errors import InvalidOption, near_names

if TYPE_CHECKING:
    from transformers import LlamaConfig

PUBLISHED_VOCABULARY = 32_000
EPSILON = 1e-6  # of the norms, and the standard deviation of the start below: the published configurations'
START = 0.02


@dataclass(frozen=True)
class Rung:
    """One size.

    Args:
        hidden: width of the residual stream.
        wide: width of the feed-forward blocks.
        layers: number of blocks.
        heads: of attention.
        vocabulary: tokens, where the run does not say.
        positions: the longest sequence.
    """

    hidden: int
    wide: int
    layers: int
    heads: int
    vocabulary: int = PUBLISHED_VOCABULARY
    positions: int = 1024

    def parameters(self, vocabulary: int | None = None) -> int:
        """Return the number of parameters: blocks, norms, the embedding and the head.

        Args:
            vocabulary: tokens; None takes the rung's.

        Example:
            >>> f"{LADDER['60M'].parameters():,}"
            '58,073,600'
        """
        block = 4 * self.hidden**2 + 3 * self.hidden * self.wide + 2 * self.hidden
        ends = 2 * (vocabulary or self.vocabulary) * self.hidden
        return self.layers * block + self.hidden + ends

    def config(self) -> "LlamaConfig":
        """Return the configuration of transformers."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.wide,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.positions,
            rms_norm_eps=EPSILON,
            initializer_range=START,
            tie_word_embeddings=False,
        )


LADDER = {
    "0.1M": Rung(48, 128, 2, 3, 512),
    "0.3M": Rung(64, 176, 3, 4, 1024),
    "1M": Rung(96, 256, 6, 3, 2048),
    "3M": Rung(160, 432, 6, 5, 4096),
    "10M": Rung(256, 688, 8, 8, 8192),
    "30M": Rung(384, 1024, 10, 6, 16_384),
    "60M": Rung(512, 1376, 8, 8),
    "130M": Rung(768, 2048, 12, 12),
    "350M": Rung(1024, 2736, 24, 16),
    "1B": Rung(2048, 5461, 24, 32),
    "3B": Rung(2560, 6848, 32, 32),
    "7B": Rung(4096, 11_008, 32, 32, positions=2048),
}


def rung(name: str) -> Rung | None:
    """Return the size of a name, in capitals or not, or None where the name is that of a model elsewhere.

    Raises:
        InvalidOption: it looks like a size, and there is none of that name.

    Example:
        >>> rung("60m").hidden, rung("models/mine")
        (512, None)
    """
    found = LADDER.get(name.upper())
    if found is None and name[:-1].replace(".", "", 1).isdigit() and name[-1:].upper() in "MB":
        raise InvalidOption(
            f"there is no size {name}{near_names(name, LADDER)}; the sizes are {', '.join(LADDER)}"
        )
    return found
