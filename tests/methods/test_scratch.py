"""Weights trained from scratch take the place of a model's own, and everything beside them trains too."""

import copy

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.errors import BaseMismatch, Incompatible

IDS = torch.tensor([[1, 5, 2, 7, 3], [4, 4, 0, 9, 8]])


def language_model(**changes):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**{"vocab_size": 12, "attention_bias": True, **sizes, **changes})
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def trained(model, steps=3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model


def test_everything_trains_biases_norms_and_embeddings_too():
    model = rf.adapt(language_model(), "low-rank", rank=3)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    assert {"bias", "weight", "value"} == names


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_loads_into_one_of_the_same_configuration(tmp_path, tied):
    model = trained(rf.adapt(language_model(tie_word_embeddings=tied), "sltrain", rank=3))
    rf.save(model, tmp_path / "model")
    loaded = language_model(tie_word_embeddings=tied, initializer_range=0.3)  # other values to begin with
    rf.load(loaded, tmp_path / "model")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(trained(loaded)(IDS).logits, trained(model)(IDS).logits)


def test_a_model_of_another_shape_is_refused_and_left_as_it_is(tmp_path):
    rf.save(rf.adapt(language_model(), "low-rank", rank=3), tmp_path / "model")
    other = language_model(intermediate_size=32)
    before = other(IDS).logits
    with pytest.raises(BaseMismatch, match="32x16 here and 24x16"):
        rf.load(other, tmp_path / "model")
    assert torch.equal(other(IDS).logits, before)


def test_fold_gives_a_stock_model_with_what_was_trained(tmp_path):
    model = trained(rf.adapt(language_model(), "sltrain", rank=3))
    wanted = model(IDS).logits
    rf.export(model, tmp_path / "dense", format="dense")
    stock = type(model).from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(stock(IDS).logits, wanted, atol=1e-5, rtol=0)
    rf.fold(model)
    assert list(model.state_dict()) == list(language_model().state_dict())
    assert all(p.requires_grad for p in model.parameters())
    rf.adapt(model, "lora", rank=2)  # and it can be adapted as any other


def test_a_folded_weight_has_the_models_dtype_and_device():
    model = rf.adapt(nn.Sequential(nn.Linear(6, 4, bias=False)), "low-rank", rank=2).double()
    assert rf.fold(model)[0].weight.dtype == torch.float64
    model = rf.adapt(nn.Sequential(nn.Linear(6, 4)).bfloat16(), "low-rank", rank=2)
    assert rf.fold(model)[0].weight.dtype == torch.bfloat16


def test_buffers_of_a_checkpoint_are_part_of_what_is_saved(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))

    model = rf.adapt(make(), "low-rank", rank=2)
    model(torch.randn(9, 6, generator=torch.Generator().manual_seed(1)))
    rf.save(model, tmp_path / "model")
    loaded = rf.load(make(), tmp_path / "model")
    assert torch.equal(loaded[1].running_mean, model[1].running_mean)
    assert loaded[1].running_mean.any()


def test_copies_hold_their_own_weights_and_can_be_folded():
    model = rf.adapt(nn.Sequential(nn.Linear(6, 4)), "low-rank", rank=2)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].adapters["default"].leaf("up").tensor().add_(1)
    x = torch.ones(1, 6)
    assert not torch.equal(twin(x), model(x))
    torch.testing.assert_close(rf.fold(copy.deepcopy(twin))(x), twin(x))


def test_no_change_stands_on_it_and_it_stands_on_no_change():
    model = rf.adapt(nn.Sequential(nn.Linear(6, 4)), "lora", rank=2)
    with pytest.raises(Incompatible, match="fold or remove it first"):
        rf.adapt(model, "low-rank", rank=2, name="other")
    for form in ("peft", "portable"):
        scratch = rf.adapt(nn.Sequential(nn.Linear(6, 4)), "low-rank", rank=2)
        with pytest.raises(Incompatible, match="everything in the model was trained"):
            rf.export(scratch, "nowhere", format=form)


def test_all_trains_what_a_change_leaves_alone_and_remove_takes_it_back():
    model = language_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    rf.adapt(model, "lora", rank=2, train="all")
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert all(name.endswith("proj.weight") for name in frozen)
    assert len(frozen) == 14
    trained(model)
    assert not torch.equal(model.model.norm.weight, before["model.norm.weight"])
    rf.remove(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_all_is_saved_loaded_and_not_exported_as_a_change(tmp_path):
    model = trained(rf.adapt(language_model(), "lora", rank=2, train="all"))
    rf.save(model, tmp_path / "model")
    assert torch.equal(rf.load(language_model(), tmp_path / "model")(IDS).logits, model(IDS).logits)
    with pytest.raises(Incompatible, match="everything in the model was trained"):
        rf.export(model, tmp_path / "peft", format="peft")


def test_numbers_are_counted_three_ways():
    plain = nn.Sequential(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64, affine=False))
    assert str(rf.count(plain)) == "4,225 stored, 4,096 active, 4,225 deployed"
    lora = rf.adapt(nn.Sequential(nn.Linear(64, 64, bias=False)), "lora", rank=2)
    assert str(rf.count(lora)) == "4,352 stored, 256 active, 4,096 deployed"
    wide = rf.adapt(nn.Sequential(nn.Linear(64, 64, bias=False)), "low-rank", rank=64)
    assert str(rf.count(wide)) == "8,192 stored, 8,192 active, 4,096 deployed"


def test_a_point_may_add_ranks_and_dynamics():
    model = rf.adapt(nn.Sequential(nn.Linear(12, 8)), "low-rank/lora+", rank=2)
    groups = rf.param_groups(model, lr=0.01)
    assert sorted({group["lr"] for group in groups}) == [0.01, 0.16]


def test_a_change_that_moves_the_weights_need_not_keep_those_it_came_from(tmp_path):
    plain = sum(p.numel() for p in language_model().parameters())
    kept = rf.adapt(language_model(), "lora/relora", rank=2, train="all")
    lean = rf.adapt(language_model(), "lora/relora", rank=2, train="all", removable=False)
    lora = sum(p.numel() for name, p in lean.named_parameters() if "adapters" in name)
    assert rf.count(lean).stored == plain + lora
    assert rf.count(kept).stored > plain + lora
    assert torch.equal(lean(IDS).logits, language_model()(IDS).logits)
    with pytest.raises(Incompatible, match="no base"):
        rf.remove(lean)
    with pytest.warns(UserWarning, match="never been attached"):
        rf.save(lean, tmp_path / "model")
    other = language_model(initializer_range=0.3)
    assert torch.equal(rf.load(other, tmp_path / "model")(IDS).logits, lean(IDS).logits)
    assert rf.count(other) == rf.count(lean)
    rf.fold(other)
    assert list(other.state_dict()) == list(language_model().state_dict())


def test_a_change_that_reads_the_weights_keeps_them(tmp_path):
    model = rf.adapt(language_model(), "lora", rank=2, train="all", removable=False)
    assert model.model.layers[0].mlp.up_proj.weight is not None
    with pytest.raises(Incompatible, match="no base"):
        rf.remove(model)
    rf.fold(trained(model))
