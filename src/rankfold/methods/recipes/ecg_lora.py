"""ECG LoRA: LoRA on every linear layer of a vision-language model, but for the output head and embeddings.

    W = W0 + s B A,   s = alpha / r,   for every linear layer but lm_head and embed_tokens

Nandakishor and Anjali 2025. LoRA on Llama 3.2 Vision, read from a million questions on images of
electrocardiograms: the linear layers of both stages of the vision encoder, of cross-attention and of the
language model. Groups are adapted alone with `targets=`, one or several of "vision", "cross-attention" and
"language", which are all of it together, or "attention" and "mlp". Rank and alpha are those of lora, for the
paper's abstract does not say its own. Start: the base, exactly.

Deviations: heads of other tasks (`score`, `classifier`) are left out too; they are trained whole as always.
"""

from ..recipe import Recipe
from ..registry import recipe


@recipe(
    "ecg-lora",
    title="High-Accuracy ECG Image Interpretation using Parameter-Efficient LoRA Fine-Tuning with Multimodal "
    "LLaMA 3.2",
    year=2025,
    arxiv="2501.18670",
    formula="W = W0 + s B A in every linear layer but lm_head and embed_tokens",
)
def ecg_lora() -> Recipe:
    """Return LoRA on all linear layers without the output head and the embeddings."""
    return Recipe("lora", targets="all-linear", exclude=("lm_head", "embed_tokens"))
