"""Changes that are open for some tokens only, and gradient checkpointing."""

import copy
import functools
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layers.models import WIDTH, Memory, adapted, gpt2, gradients, llama, seeded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import rankfold as rf
from rankfold.errors import InvalidOption, NotDense, UnsupportedLayer

INVOCATION = (5, 6)
MODELS = {"llama": llama, "gpt2": gpt2}


def prompt() -> Tensor:
    """Two rows, invoked at different places."""
    ids = torch.randint(8, 40, (2, 9), generator=torch.Generator().manual_seed(3))
    ids[0, 4:6], ids[1, 6:8] = torch.tensor(INVOCATION), torch.tensor(INVOCATION)
    return ids


def padded() -> tuple[Tensor, Tensor]:
    """The same rows, the first with two tokens of padding on the left and two fewer at its start."""
    ids, mask = prompt(), torch.ones(2, 9, dtype=torch.long)
    ids[0, :2], mask[0, :2] = 0, 0
    return ids, mask


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    made_model: Any = seeded(MODELS[request.param])
    made_model.generation_config.pad_token_id = 0
    made_model.generation_config.eos_token_id = None
    return made_model


def invoked(model: Any) -> Any:
    return adapted(model, "alora", rank=4, invocation=INVOCATION)


# alora ------------------------------------------------------------------------------------------------


def test_tokens_before_the_invocation_are_the_bases(model: Any) -> None:
    ids = prompt()
    before = model(ids).logits
    invoked(model)
    after = model(ids).logits
    for row, start in ((0, 4), (1, 6)):
        torch.testing.assert_close(after[row, :start], before[row, :start])
        assert not torch.allclose(after[row, start:], before[row, start:], atol=1e-3)
    uninvoked = torch.full((2, 5), 9)
    adapted_output = model(uninvoked).logits
    torch.testing.assert_close(adapted_output, rf.remove(model)(uninvoked).logits)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
@pytest.mark.parametrize("padding", [False, True], ids=["plain", "padded"])
def test_generating_with_a_cache_gives_what_full_forwards_give(
    model: Any, padding: bool, options: dict[str, int]
) -> None:
    invoked(model)
    ids, mask = padded() if padding else (prompt(), torch.ones(2, 9, dtype=torch.long))
    generate = functools.partial(
        model.generate, ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **options
    )
    assert torch.equal(generate(use_cache=True), generate(use_cache=False))
    scores = generate(use_cache=True, return_dict_in_generate=True, output_logits=True)
    if not options:
        longer = torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], 1)
        full = model.generate(
            scores.sequences[:, :-1], attention_mask=longer[:, :-1], max_new_tokens=1, use_cache=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        torch.testing.assert_close(scores.logits[-1], full.logits[0], atol=1e-4, rtol=1e-4)


def test_a_cache_filled_by_the_base_serves_the_adapted_model(model: Any) -> None:
    ids = prompt()[:1]
    invoked(model)
    full = model(ids).logits
    with rf.disabled(model), torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
    torch.testing.assert_close(
        model(ids[:, 4:], past_key_values=cache).logits, full[:, 4:], atol=1e-5, rtol=1e-4
    )


def test_token_by_token_equals_the_full_forward(model: Any) -> None:
    ids = prompt()
    invoked(model)
    full, cache, steps = model(ids).logits, None, []
    for place in range(3, 10):
        piece = ids[:, :3] if cache is None else ids[:, place - 1 : place]
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits[:, -1])
    # An invocation is only known once it is complete: its own first token passed as the base's.
    torch.testing.assert_close(torch.stack(steps, 1)[1, :4], full[1, 2:6], atol=1e-5, rtol=1e-4)


def test_an_invocation_in_the_prompt_is_known_with_a_cache_that_the_model_has_made_itself(model: Any) -> None:
    ids = prompt()
    invoked(model)
    full = model(ids).logits
    cache = model(ids[:, :8], use_cache=True).past_key_values
    last = model(ids[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(last[:, 0], full[:, 8], atol=1e-5, rtol=1e-4)


def test_the_gate_follows_what_is_done_to_a_cache(model: Any) -> None:
    ids = prompt()
    invoked(model)
    with torch.no_grad():
        full = model(ids).logits
        cache = model(ids[:, :8], use_cache=True).past_key_values
        copied, turned, cropped = (copy.deepcopy(cache) for _ in range(3))
        last = model(ids[:, 8:], past_key_values=copied).logits[:, 0]
        torch.testing.assert_close(last, full[:, 8], atol=1e-5, rtol=1e-4)
        turned.reorder_cache(torch.tensor([1, 0]))
        last = model(ids.flip(0)[:, 8:], past_key_values=turned).logits[:, 0]
        torch.testing.assert_close(last, full.flip(0)[:, 8], atol=1e-5, rtol=1e-4)
        cropped.crop(-4)
        other = torch.cat([ids[:, :4], torch.full((2, 3), 9)], 1)
        uninvoked = model(other[:, 4:], past_key_values=cropped).logits
        torch.testing.assert_close(uninvoked, model(other).logits[:, 4:], atol=1e-5, rtol=1e-4)


def test_a_part_of_the_model_does_not_read_gates_of_a_forward_that_has_ended(model: Any) -> None:
    invoked(model)
    model(prompt())
    with pytest.raises(NotDense, match="call the whole adapted model, not one of its parts"):
        model.base_model(prompt())


def test_a_forward_that_fails_has_ended_too(model: Any) -> None:
    invoked(model)
    model(prompt())
    with pytest.raises(IndexError):
        model(torch.full((2, 9), 10**6))
    with pytest.raises(NotDense, match="not one of its parts"):
        model.base_model(prompt())


def test_a_model_with_gates_can_be_pickled_after_a_forward() -> None:
    model: Any = seeded(llama)
    rf.adapt(model, "mixture", rank=2, experts=2).train()
    model(prompt(), labels=prompt()).loss.backward()
    twin = pickle.loads(pickle.dumps(model)).eval()  # noqa: S301 - its own bytes
    assert torch.equal(twin(prompt()).logits, model.eval()(prompt()).logits)


def test_a_gate_input_that_nothing_reads_is_refused() -> None:
    model = rf.adapt(seeded(llama), "kind", rank=2, classes=3)
    with pytest.raises(InvalidOption, match=r"no adapter .* reads the gate input 'clases'; .*classes"):
        rf.gate_inputs(model, clases=torch.tensor([0])).__enter__()


# reft -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [False, True], ids=["plain", "padded"])
def test_edited_positions_survive_generation_with_a_cache(model: Any, padding: bool) -> None:
    ids, mask = padded() if padding else (prompt(), torch.ones(2, 9, dtype=torch.long))
    adapted(model, "reft", rank=2, positions="f2+l1")
    generate = functools.partial(model.generate, ids, attention_mask=mask, max_new_tokens=1, do_sample=False)
    out = generate(return_dict_in_generate=True, output_logits=True, use_cache=True)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    full = model(ids, attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(out.logits[0], full[:, -1], atol=1e-5, rtol=1e-4)
    if padding:
        alone = model(ids[:1, 2:]).logits[:, -1]
        torch.testing.assert_close(out.logits[0][:1], alone, atol=1e-4, rtol=1e-3)


def test_hidden_states_show_the_edit(model: Any) -> None:
    ids = prompt()
    before = model(ids, output_hidden_states=True).hidden_states
    adapted(model, "reft", rank=2, positions="f1+l0")
    after = model(ids, output_hidden_states=True).hidden_states
    assert not torch.allclose(after[1][:, 0], before[1][:, 0], atol=1e-3)
    torch.testing.assert_close(after[1][:, 1:], before[1][:, 1:])


def test_an_edited_sequential_block_still_computes() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(hidden_size=6)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model, x = seeded(Blocks), torch.randn(2, 5, 6)
    before, memory = model(x), Memory(model)
    adapted(model, "reft", rank=2, positions="f1+l1")
    after = model(x)
    assert not torch.allclose(after[:, 0], before[:, 0], atol=1e-3)
    torch.testing.assert_close(after[:, 1:-1], before[:, 1:-1])
    rf.remove(model)
    memory.check(model)


def test_a_block_whose_output_is_no_tensor_is_refused() -> None:
    class Returns(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"hidden": x}

    odd = nn.ModuleDict({"block": Returns()})
    odd.config = SimpleNamespace(hidden_size=6)
    rf.adapt(odd, "reft", rank=2, targets="block")
    with pytest.raises(UnsupportedLayer, match="the output of Returns is dict"):
        odd.block(torch.ones(1, 2, 6))


# Copies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"), [("alora", {"invocation": INVOCATION}), ("reft", {"positions": "f2+l1"})]
)
def test_a_copy_has_gates_and_hooks_of_its_own(model: Any, method: str, options: dict[str, Any]) -> None:
    adapted(model, method, rank=4, **options)
    twin, ids, others = copy.deepcopy(model), prompt(), prompt().flip(1)
    wanted, other = model(ids).logits, model(others).logits
    assert torch.equal(twin(ids).logits, wanted)
    twin(others)
    assert torch.equal(model(ids).logits, wanted)
    rf.remove(model)
    assert torch.equal(twin(others).logits, other)


# Checkpointing ----------------------------------------------------------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.0}, "dora": {}, "hira": {}, "hra": {}, "vera": {"rank": 4},
    "alora": {"invocation": INVOCATION, "rank": 4}, "reft": {"positions": "f2+l1"},
}  # fmt: skip


def two_forwards(call: Callable[[Tensor], Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of two forwards before one backward."""
    model.zero_grad()
    ids = prompt()
    loss = call(ids).square().mean() + 2 * call(ids.flip(1)).square().mean()
    loss.backward()
    found = gradients(model)
    assert any(value.abs().sum() > 0 for value in found.values())
    return found


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert set(first) == set(second)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_changes_no_gradient(model: Any, method: str, reentrant: bool) -> None:
    adapted(model, method, **{"rank": 2, **METHODS[method]})
    model.train()

    def call(ids: Tensor) -> Tensor:
        result: Tensor = model(ids, use_cache=False).logits
        return result

    wanted = two_forwards(call, model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(wanted, two_forwards(call, model))
    model.activation_checkpointing_disable()
    assert_same(wanted, two_forwards(call, model))


def test_removing_gives_the_model_its_own_checkpointing_back(model: Any) -> None:
    model.activation_checkpointing_enable()
    model.train()
    functions = [getattr(m, "_gradient_checkpointing_func", None) for m in model.modules()]
    adapted(model, "alora", rank=2, invocation=INVOCATION)
    model(prompt(), use_cache=False)
    rf.remove(model)
    assert [getattr(m, "_gradient_checkpointing_func", None) for m in model.modules()] == functions
    adapted(model, "alora", rank=2, invocation=INVOCATION)
    wanted = copy.deepcopy(model)
    wanted.activation_checkpointing_disable()
    assert_same(
        two_forwards(lambda ids: wanted(ids, use_cache=False).logits, wanted),
        two_forwards(lambda ids: model(ids, use_cache=False).logits, model),
    )


class Plain(nn.Module):
    """Blocks without a library, checkpointed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=WIDTH)
        self.embed = nn.Embedding(40, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self.how: bool | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x) if self.how is None else rf.checkpoint(self, block, x, use_reentrant=self.how)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_by_hand_changes_no_gradient(method: str, reentrant: bool) -> None:
    model: Any = seeded(Plain)
    targets = {"reft": "blocks"}.get(method, "all-linear")
    adapted(model, method, targets=targets, **{"rank": 2, **METHODS[method]})
    wanted = two_forwards(model, model)
    model.how = reentrant
    assert_same(wanted, two_forwards(model, model))


def test_checkpointing_by_hand_works_on_a_plain_model() -> None:
    linear, x = nn.Linear(4, 4), torch.randn(2, 4)
    torch.testing.assert_close(
        rf.checkpoint(linear, linear, x), torch_checkpoint(linear, x, use_reentrant=False)
    )
    rf.checkpoint(linear, linear, x, use_reentrant=True).sum().backward()
    assert linear.weight.grad is not None
