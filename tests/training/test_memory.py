import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rankfold.training.memory import predict_memory

CONFIG = LlamaConfig(
    vocab_size=500,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    tie_word_embeddings=True,
)


def test_weights_count_tied_tensors_once_and_what_trains_in_float32() -> None:
    model = LlamaForCausalLM(CONFIG).to(torch.bfloat16)
    memory = predict_memory(model, trainable=1000, tokens=8)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert memory.weights == 2 * parameters + buffers + 4 * 1000
    assert (memory.gradients, memory.optimizer) == (4000, 8000)
    assert memory.total == memory.weights + 12_000 + memory.activations


def test_the_estimate_of_activations_is_within_a_factor_of_two_of_what_is_kept() -> None:
    model = LlamaForCausalLM(CONFIG)
    kept: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.get_input_embeddings().weight.requires_grad_(True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
    tokens = torch.randint(0, 500, (4, 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=tokens, labels=tokens).loss
    assert loss.requires_grad
    estimate = predict_memory(model, trainable=0, tokens=tokens.numel()).activations
    assert 0.5 < estimate / sum(kept.values()) < 2
