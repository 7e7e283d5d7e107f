"""Which layers a target means."""

import re

import pytest
import torch
from layers.models import MODELS, Memory, adapted, llama, logits, made, perturb, seeded
from torch import nn

import rankfold as rf
from rankfold.errors import Incompatible, UnknownTarget, UnsupportedLayer
from rankfold.layers import output_heads, task_heads

LAST = {  # the names of the linear layers in each model's blocks
    "llama": ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}),
    "gpt2": ({"attn.c_attn", "attn.c_proj"}, {"mlp.c_fc", "mlp.c_proj"}),
    "bert": (
        {"self.query", "self.key", "self.value", "attention.output.dense"},
        {"intermediate.dense", r"\d.output.dense"},
    ),
    "t5": ({"q", "k", "v", "o"}, {"wi", "wo"}),
    "bart": ({"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc1", "fc2"}),
    "opt": ({"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc1", "fc2"}),
    "vit": ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"fc1", "fc2"}),
    "distilbert": ({"q_lin", "k_lin", "v_lin", "out_lin"}, {"ffn.lin1", "ffn.lin2"}),
}
OUTSIDE_BLOCKS = {"bert": {"bert.pooler.dense"}}
HEADS = {
    "llama": {"lm_head"}, "gpt2": {"lm_head"}, "bert": {"classifier"}, "t5": {"lm_head"},
    "bart": {"classification_head"}, "opt": {"lm_head"}, "vit": {"classifier"},
    "distilbert": {"classifier", "pre_classifier"},
}  # fmt: skip
# Patches are projected; the embeddings of Bart have a forward of their own.
NO_EMBEDDINGS = {("vit", "embeddings"), ("bart", "embeddings")}
pytestmark = pytest.mark.filterwarnings("ignore:.*rank capped", "ignore:.*shares its tensor")


def reached(name: str, targets: rf.layers.Targets) -> set[str]:
    return {site.path for site in rf.plan(made(name), "lora", rank=2, targets=targets).sites}


def named(paths: set[str], endings: set[str]) -> bool:
    """Say whether every path has one of the endings, and every ending is that of a path."""
    ends = {path: {e for e in endings if re.search(rf"(^|\.){e}$", path)} for path in paths}
    return all(ends.values()) and set().union(*ends.values()) == endings


@pytest.mark.parametrize("name", MODELS)
def test_presets_take_the_layers_of_attention_and_of_the_feed_forward_blocks(name: str) -> None:
    attention, mlp = LAST[name]
    assert named(reached(name, "attention"), attention)
    assert named(reached(name, "mlp"), mlp)
    assert not reached(name, "attention") & reached(name, "mlp")


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_takes_every_linear_layer_but_the_heads(name: str) -> None:
    outside = OUTSIDE_BLOCKS.get(name, set())
    everything = reached(name, "all-linear")
    assert everything == reached(name, "attention") | reached(name, "mlp") | outside
    assert {head for head in output_heads(made(name)) if head in dict(made(name).named_children())} == HEADS[
        name
    ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("preset", ["attention", "mlp", "all-linear", "embeddings"])
def test_every_preset_adapts_every_model(name: str, preset: str) -> None:
    model = made(name)
    if (name, preset) in NO_EMBEDDINGS:
        with pytest.raises(UnknownTarget, match="target 'embeddings' matches nothing in "):
            rf.adapt(model, "lora", rank=2, targets=preset)
        return
    memory, before = Memory(model), logits(model, name)
    with torch.no_grad():  # with gradients, torch orders a product by which side requires one
        plain = logits(model, name)
        rf.adapt(model, "lora", rank=2, targets=preset)
        assert torch.equal(logits(model, name), plain)
    perturb(model)
    after = logits(model, name)
    assert not torch.allclose(after, before, atol=1e-4)
    after.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    rf.remove(model)
    memory.check(model)
    assert torch.equal(logits(model, name), before)


@pytest.mark.parametrize("name", MODELS)
def test_folding_any_model_gives_the_adapted_output(name: str) -> None:
    model = adapted(made(name), "dora")
    after = logits(model, name)
    rf.fold(model)
    torch.testing.assert_close(logits(model, name), after, atol=1e-5, rtol=1e-4)
    assert not any(isinstance(m, rf.layers.StructuredLayer) for m in model.modules())


def test_the_head_is_left_out_of_a_model_inside_another() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

    paths = {site.path for site in rf.plan(seeded(Wrapper), "lora", rank=2, targets="all-linear").sites}
    assert len(paths) == 14
    assert "inner.lm_head" not in paths


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("q_proj", 2),
        ("self_attn.?_proj", 8),
        ("model.layers.0.*", 7),
        ("layers.[1].mlp.down_proj", 1),
        (re.compile(r"model\.layers\.\d\.mlp\..*"), 6),
        (r"re:.*\.0\..*(q|v)_proj", 2),
        (["q_proj", "v_proj", "embed_tokens"], 5),
        (["attention", "down_proj"], 10),
        (("lm_head",), 1),
    ],
)
def test_globs_endings_expressions_and_lists_name_layers(targets: rf.layers.Targets, count: int) -> None:
    assert len(reached("llama", targets)) == count


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        ("q_porj", "target 'q_porj' matches nothing in LlamaForCausalLM; did you mean .*q_proj"),
        ("attentoin", "did you mean attention"),
        ("zzz", "the model has .*down_proj.*lm_head"),
        (["q_proj", "nothing_here"], "'nothing_here' matches nothing"),
        (r"re:layers.*", "matches nothing"),
        ("re:(", r"'re:\(' is no regular expression"),
        ([], "no targets were given"),
        ("convolutions", "'convolutions' matches nothing"),
    ],
)
def test_a_target_that_matches_nothing_is_refused_with_near_names(
    targets: rf.layers.Targets, sentence: str
) -> None:
    model = made("llama")
    memory = Memory(model)
    with pytest.raises(UnknownTarget, match=sentence):
        rf.adapt(model, "lora", rank=2, targets=targets)
    memory.check(model)


def test_a_module_is_no_target() -> None:
    model = made("llama")
    with pytest.raises(UnknownTarget, match="targets are names, not modules"):
        rf.adapt(model, "lora", rank=2, targets=[model.lm_head])


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        ("input_layernorm", r"matches model\.layers\.0\.input_layernorm, but LlamaRMSNorm is no layer"),
        ("self_attn", r"matches model\.layers\.0\.self_attn, but LlamaAttention is no layer"),
        (r"re:.*norm", r"matches .*norm, but LlamaRMSNorm is no layer"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_refused(targets: str, sentence: str) -> None:
    with pytest.raises(UnsupportedLayer, match=sentence):
        rf.adapt(made("llama"), "lora", rank=2, targets=targets)


def test_a_model_that_is_one_layer_is_to_be_wrapped() -> None:
    with pytest.raises(UnknownTarget, match=r"matches nothing in Linear, which is itself a layer; wrap it"):
        rf.adapt(nn.Linear(4, 4), "lora", rank=2)


def test_a_structure_refuses_named_layers_of_other_kinds_and_skips_them_in_a_preset() -> None:
    model = made("llama")
    for targets in ("embed_tokens", ["q_proj", "embed_tokens"], re.compile(".*(q_proj|embed_tokens)")):
        with pytest.raises(
            UnsupportedLayer, match=r"model\.embed_tokens: alora applies to linear layers only"
        ):
            rf.plan(model, "alora", rank=2, targets=targets, invocation=(1,))


def test_a_plan_reports_what_matches_and_what_does_not() -> None:
    model = made("llama")
    memory = Memory(model)
    plan = rf.plan(model, "lora", rank=2, targets="attention", train=("model.norm",))
    memory.check(model)
    assert len(plan.sites) == 8
    assert set(plan.unmatched) == {"model.embed_tokens", "lm_head"} | {
        f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("gate", "up", "down")
    }
    first = plan.sites[0]
    assert (first.path, first.shape, first.rank) == ("model.layers.0.self_attn.q_proj", (16, 16), 2)
    assert plan.train == ("model.norm",)
    text = str(plan)
    assert "model.layers.1.self_attn.o_proj" in text
    assert "not matched: model.embed_tokens" in text
    rf.adapt(model, "lora", rank=2, targets="attention", train=("model.norm",))
    assert plan.trainable == rf.summary(model).trainable


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_plan_counts_tied_layers_once_and_as_matched(name: str) -> None:
    plan = rf.plan(made(name), "lora", rank=2, targets="lm_head")
    assert len(plan.sites) == 1
    assert not any("embed_tokens" in path or "wte" in path or path == "shared" for path in plan.unmatched)
    assert any("shares its tensor" in note for note in plan.notes)


# Modules trained whole --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "vit", "bart", "distilbert"])
def test_the_head_of_a_task_model_is_trained_whole_without_being_asked_for(name: str) -> None:
    model = made(name)
    assert set(task_heads(model)) == HEADS[name]
    rf.adapt(model, "lora", rank=2)
    trained = {
        n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad and ".adapters." not in n
    }
    assert trained == HEADS[name]
    assert all(any(key.startswith(head) for key in rf.summary(model).whole) for head in HEADS[name])


@pytest.mark.parametrize("name", ["llama", "t5", "opt"])
def test_the_head_of_a_language_model_is_not_trained(name: str) -> None:
    model = made(name)
    assert task_heads(model) == []
    rf.adapt(model, "lora", rank=2)
    assert all(".adapters." in n for n, p in model.named_parameters() if p.requires_grad)


def test_a_head_that_is_adapted_is_not_also_trained_whole() -> None:
    model = rf.adapt(made("bert"), "lora", rank=2, targets=["attention", "classifier"])
    assert rf.summary(model).whole == ()
    assert not model.classifier.weight.requires_grad


@pytest.mark.parametrize(
    ("train", "error", "sentence"),
    [
        (
            ("clasifier",),
            UnknownTarget,
            r"train='clasifier' is no module of BertFor\w+; did you mean classifier",
        ),
        (
            ("attention",),
            Incompatible,
            r"query is both adapted and trained whole \(train='bert\.\S+'\); choose one",
        ),
    ],
)
def test_modules_to_train_are_checked(train: tuple[str, ...], error: type[Exception], sentence: str) -> None:
    model = made("bert")
    memory = Memory(model)
    with pytest.raises(error, match=sentence):
        rf.adapt(model, "lora", rank=2, targets="query", train=train)
    memory.check(model)


def test_what_an_adapter_brought_is_no_target() -> None:
    model = adapted(seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh())), targets="0")
    for method, names in (
        ("lora", {"targets": "terms*"}),
        ("reft", {"targets": "terms*"}),
        ("lora", {"train": ("terms*",)}),
    ):
        with pytest.raises(UnknownTarget, match=r"terms\*"):
            rf.adapt(model, method, rank=1, name="second", **{"targets": "0", **names})


def test_one_module_to_train_may_be_given_as_text() -> None:
    model = rf.adapt(made("llama"), "lora", rank=2, train="model.norm")
    assert rf.summary(model).whole == ("model.norm.weight",)


def test_a_second_adapter_cannot_train_a_layer_that_the_first_adapts() -> None:
    model = rf.adapt(made("llama"), "lora", rank=2, targets="lm_head")
    with pytest.raises(Incompatible, match="lm_head is both adapted and trained whole"):
        rf.adapt(model, "lora", rank=2, targets="attention", name="second", train=("lm_head",))
