"""The generic battery: facts that every registered structure keeps, from every start that it accepts.

The checks are generated from the catalogue, so a method passes them by being registered. What it cannot do it
says in its registration (`layers`, `limit`, `multiple`, `gate`, `activations`, `refuses`), and the battery
then asserts that it refuses aloud. Another package runs the battery over its own methods:

    import pytest
    from battery import check_method

    @pytest.mark.parametrize("check", check_method("my-method"), ids=str)
    def test_my_method(check):
        check()
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
import pickle
import random
import re
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hosts import KINDS, LARGE, SHAPES, Blocks, Host, blocks, token_ids
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import rankfold as rf
from rankfold.errors import Incompatible, NotDense, RankfoldError
from rankfold.layers import Adaptation, StructuredLayer, StructuredTransposedLinear, carrier, require
from rankfold.methods.recipe import resolve
from rankfold.methods.registry import EXACT as EXACT_START
from rankfold.methods.registry import Method, StepZero, structure_named
from rankfold.weights import Experts, Gated, Leaf, Normalized, Scaled, Spectral, Sum, Weight
from rankfold.weights.competing import Competing

EVERY_KIND = (
    "kaiming",
    "pissa",
    "svd",
)  # an initialiser without data for a zero, a residual and a frame start
EXACT = 1e-9  # relative to the largest entry, in float64
HALF = 0.05  # likewise, where bfloat16 is involved
# Most words of the language compile in the default run in one of these; all do in the slow one.
COMPILED = (
    "abba", "alora", "dora", "gralora", "hra", "lift", "lokr", "lora", "losia-pro", "mixture", "nola", "oft",
    "reft", "sltrain", "snell", "vera",
)  # fmt: skip
CALIBRATION = token_ids()  # a batch, for structures that read data
SOON = {"singlora": {"ramp": 5}}  # options that let a schedule act within a few steps


@dataclass(frozen=True)
class Point:
    """A structure with one of the starts that it accepts.

    Attributes:
        structure: its entry in the catalogue.
        init: that of the initialiser, or None where there is nothing to initialise.
        options: of the structure.
    """

    structure: Method
    init: Method | None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [self.structure.name, *([self.init.name] if self.init else [])]
        options = [f"{k}={v}" for k, v in self.options.items() if k not in self.structure.traits["example"]]
        return "/".join(parts) + (f"({', '.join(options)})" if options else "")

    @property
    def recipe(self) -> rf.Recipe:
        """The recipe to adapt with."""
        return rf.Recipe((self.structure.name, self.options), self.init.name if self.init else None)

    @property
    def rank(self) -> int | None:
        """A rank that fits small weights, or None where the structure has none."""
        multiple = self.structure.traits["multiple"](self._filled)
        return None if self.structure.traits["rank"] is None else multiple * max(1, 2 // multiple)

    def largest_rank(self, shape: tuple[int, int]) -> int | None:
        """The most that a weight can hold; where there is no limit, more than either side and than 32."""
        limit, multiple = self.structure.traits["limit"], self.structure.traits["multiple"](self._filled)
        if self.structure.traits["rank"] is None:
            return None
        return (limit(shape) if limit else 40) // multiple * multiple  # type: ignore[no-any-return]

    @property
    def _filled(self) -> dict[str, Any]:
        return {**self.structure.options, **self.options}

    @property
    def start(self) -> StepZero:
        """The step-0 promise of the parts together: the weaker one."""
        promises = [self.structure.start, *([self.init.start] if self.init else [])]
        other = [p for p in promises if p.kind == "other"]
        return other[0] if other else max(promises, key=lambda p: p.tolerance)

    @property
    def is_own(self) -> bool:
        """Whether the start is the paper's own."""
        default = self.structure.traits["init"]
        return self.init is None or self.init.name == (default if isinstance(default, str) else default[0])

    @property
    def on_activations(self) -> bool:
        """Whether a module's output is edited, not a weight."""
        return bool(self.structure.traits["activations"])

    @property
    def is_gated(self) -> bool:
        """Whether the change needs the whole model to know where it is open."""
        return self.structure.traits["gate"] is not None

    @property
    def has_matrix(self) -> bool:
        """Whether the changed weight is a matrix, the same for every token."""
        return not (self.on_activations or self.is_gated or self.structure.traits["nonlinear"])

    @property
    def targets(self) -> str:
        """What is adapted in the model of blocks."""
        if self.on_activations or "linear" in self.structure.traits["layers"]:
            return str(self.structure.traits["targets"])
        return "embeddings"

    @property
    def data(self) -> dict[str, Any]:
        """What a structure that reads data is given."""
        return {"data": [CALIBRATION], "progress": False} if self.structure.traits["needs"] else {}

    def blocks(self, dtype: torch.dtype = torch.float32) -> Blocks:
        """Return the model of blocks; its feed-forward parts are gated modules where those are edited."""
        return blocks(dtype, gated=self.targets == "gated-mlp")

    @property
    def is_scratch(self) -> bool:
        """Whether it takes the place of the weight, and everything trains."""
        return bool(self.structure.traits["scratch"])

    def refuses(self, host: Host) -> bool:
        """Whether the registration says that a layer is refused."""
        traits = self.structure.traits
        return host.kind not in traits["layers"] or host.name in traits.get("refuses", ())


@dataclass(frozen=True)
class Check:
    """A named fact about a point; calling it asserts the fact.

    Attributes:
        point: what is checked.
        name: a sentence.
        run: raises AssertionError where the fact does not hold.
        is_slow: takes seconds and rarely finds anything.
    """

    point: Point
    name: str
    run: Callable[[], None]
    is_slow: bool = False

    def __call__(self) -> None:
        with inputs_at_hand():
            self.run()

    def __str__(self) -> str:
        return f"{self.point}: {self.name}"


class EveryRegion(dict[str, Tensor]):
    """The left half of an image for every adapter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> Tensor:
        return torch.arange(self.width)[None] < self.width / 2


@contextlib.contextmanager
def inputs_at_hand() -> Iterator[None]:
    """Within the block every forward comes with what gates ask for beside the arguments of the model."""
    read = carrier.read_inputs

    def with_more(module: nn.Module, *args: Any) -> carrier.ModelInputs:
        inputs = read(module, *args)
        classes, regions = torch.arange(inputs.batch) % 3, EveryRegion(inputs.length or 1)
        inputs.given = {"classes": classes, "regions": regions, **inputs.given}
        return inputs

    with mock.patch.object(carrier, "read_inputs", with_more):
        yield


def points(name: str, **options: Any) -> list[Point]:
    """Return a structure with its own start and one of every kind that it accepts, its `example` filled in.

    That every other initialiser keeps its contract is checked by the tests of the whole space.
    """
    structure = structure_named(name)
    options = {**structure.traits["example"], **options}
    if structure.traits["init"] is None:
        return [Point(structure, None, options)]
    own = (
        structure.traits["init"] if isinstance(structure.traits["init"], str) else structure.traits["init"][0]
    )
    inits = [
        i for i in rf.methods("init") if i.name in {own, *EVERY_KIND} and _accepts(structure, i, options)
    ]
    return [Point(structure, i, options) for i in inits]


def _accepts(structure: Method, init: Method, options: Mapping[str, Any]) -> bool:
    try:
        resolve(rf.Recipe((structure.name, options), init.name), {})
    except Incompatible:
        return False
    return True


def check_method(name: str, **options: Any) -> list[Check]:
    """Return every check of a registered structure.

    Args:
        name: of the structure.
        options: of the structure, beside its `example`.
    """
    return [check for point in points(name, **options) for check in check_point(point)]


def check_point(point: Point) -> Iterator[Check]:
    """Yield every check of one point."""
    yield Check(point, "the registration describes the method", partial(describes_itself, point))
    yield Check(point, "declares what other axes act on", partial(declares_its_parts, point))
    yield Check(point, "refuses starts that have no meaning for it", partial(refuses_other_inits, point))
    if not point.on_activations:
        yield from _layer_checks(point)
    for check in SCRATCH_CHECKS if point.is_scratch else MODEL_CHECKS:
        sentence = (check.__doc__ or check.__name__).split("\n")[0].rstrip(".").lower()
        slow = check is compiles and not (point.is_own and point.structure.name in COMPILED)
        yield Check(point, sentence, partial(check, point), slow)


def _layer_checks(point: Point) -> Iterator[Check]:
    for host in (*SHAPES, *KINDS):
        if point.refuses(host):
            yield Check(point, f"refuses aloud: {host.name}", partial(refuses_aloud, point, host))
        elif point.has_matrix:
            for check in (c for c in LAYER_CHECKS if not (point.is_scratch and c in NOT_FROM_SCRATCH)):
                sentence = (check.__doc__ or check.__name__).split("\n")[0].rstrip(".").lower()
                yield Check(point, f"{sentence}: {host.name}", partial(check, point, host))
    if point.has_matrix:
        yield Check(
            point, "apply equals dense at the largest rank", partial(applies_at_the_largest_rank, point)
        )
        yield Check(
            point, "counted multiply-adds are the real ones", partial(counts_its_multiplications, point)
        )
    if point.has_matrix and not point.refuses(LARGE):
        yield Check(point, "apply equals dense for many tokens", partial(applies_to_many_tokens, point))
    if point.has_matrix and point.is_own and not point.refuses(LARGE) and not point.is_scratch:
        for tokens in (256, 4096):
            sentence = f"keeps no more for backward than its matrix would, nor much: {tokens} tokens"
            yield Check(point, sentence, partial(keeps_little_for_backward, point, tokens))


# Making models ----------------------------------------------------------------------------------------


def adapted(point: Point, model: nn.Module, targets: str, **arguments: Any) -> nn.Module:
    """Return the model, adapted in place."""
    return rf.adapt(model, point.recipe, targets=targets, **{"rank": point.rank, **point.data, **arguments})


def adapted_layer(
    point: Point, host: Host, dtype: torch.dtype = torch.float64, **arguments: Any
) -> nn.Module:
    """Return the adapted model of one layer."""
    return adapted(point, host.model(dtype), host.path, **arguments)


def adapted_blocks(point: Point, dtype: torch.dtype = torch.float32, **arguments: Any) -> Blocks:
    """Return the adapted model of blocks, moved away from its start."""
    return disturbed(adapted(point, point.blocks(dtype), point.targets, **arguments))  # type: ignore[return-value]


def disturbed(model: nn.Module, seed: int = 7, size: float = 0.3) -> nn.Module:
    """Add noise to everything that trains: at a zero start many mistakes cannot be seen."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in trainable(model).items():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.data.add_(size * noise)
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains, by name."""
    return {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}


def structured(model: nn.Module) -> StructuredLayer:
    """Return the one layer of a model that holds an expression."""
    return next(m for m in model.modules() if isinstance(m, StructuredLayer) and m.expression is not None)


def expression_of(model: nn.Module) -> Weight:
    """Return the expression of the one adapted layer."""
    expression = structured(model).expression
    assert expression is not None
    return expression


def through_matrix(model: nn.Module, x: Tensor) -> Tensor:
    """Return the output of the original layer with `dense()` in the place of its weight."""
    layer = structured(model)
    matrix = expression_of(model).dense()
    if layer.is_released and layer.looked_up:
        return F.embedding(x, matrix, layer.padding_idx)
    if layer.is_released and layer.materialised:
        name = "layer.in_proj_weight" if matrix.shape[0] > matrix.shape[1] else "layer.out_proj.weight"
        plain = rf.fold(copy.deepcopy(model))
        rest = {
            key: value for key, value in model.named_parameters() if key in dict(plain.named_parameters())
        }
        return functional_call(plain, {**rest, name: matrix}, (x,))
    if layer.is_released:
        return layer.op.apply(x, matrix, layer._parameters["bias"])
    if isinstance(layer, StructuredTransposedLinear):
        matrix = matrix.T
    if layer.materialised:
        name = "layer.in_proj_weight" if matrix.shape[0] > matrix.shape[1] else "layer.out_proj.weight"
        plain = rf.remove(copy.deepcopy(model))
        return functional_call(plain, {name: matrix}, (x,))
    stored = layer.original.weight
    return functional_call(layer.original, {"weight": matrix.reshape(stored.shape)}, (x,))  # type: ignore[union-attr,operator,arg-type]


def gradients(output: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Return the gradients of a fixed random function of the output."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output.dtype)
    return list(torch.autograd.grad((output * weights).sum(), tensors, allow_unused=True))


def learning_apart(model: nn.Module) -> set[int]:
    """Return the identities of parameters that the loss gives no gradient."""
    found: set[int] = set()
    for name, adapter in require(model).adapters.items():
        leaves = resolve(rf.Recipe.from_dict(adapter.record["recipe"]), {}).structure.traits["apart"]
        owned = require(model).owned(name).items()
        found |= {id(getattr(*place)) for key, place in owned if key.rpartition(":")[2] in leaves}
    return found


def loss_gradients(model: nn.Module, *batches: Tensor) -> dict[str, Tensor]:
    """Return the gradients after one backward over several forwards."""
    model.zero_grad()
    sum(model(batch).float().square().mean() for batch in batches).backward()  # type: ignore[union-attr]
    found = {name: p.grad for name, p in trainable(model).items()}
    apart = learning_apart(model)
    missing = [name for name, p in trainable(model).items() if p.grad is None and id(p) not in apart]
    assert not missing, f"no gradient reaches {missing}"
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def half_of(point: Point) -> float:
    """Return how far bfloat16 may be off: without bound where rounding changes what a method chooses."""
    return float("inf") if point.structure.traits["chooses"] else HALF


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Assert that two tensors differ by at most a share of the largest expected entry."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} instead of {expected.shape}"
    difference = (actual.double() - expected.double()).abs().max() if actual.numel() else torch.zeros(())
    scale = expected.double().abs().max().clamp_min(1e-3) if expected.numel() else torch.ones(())
    assert difference <= tolerance * scale, (
        f"{what} is off by {(difference / scale).item():.1e} of its largest"
    )


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Assert that two sets of named tensors are equal, bit for bit."""
    assert list(actual) == list(expected), f"{what}: the names differ"
    wrong = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not wrong, f"{what}: {wrong} differ"


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything that `remove` has to restore."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "flags": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "parameters": [(name, id(p)) for name, p in model.named_parameters()],
        "hooks": [
            (name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()
        ],
        "attributes": [(name, sorted(m.__dict__)) for name, m in model.named_modules()],
    }


def assert_untouched(model: nn.Module, before: Mapping[str, Any]) -> None:
    """Assert that a model is what it was, bit for bit."""
    after = snapshot(model)
    assert_same(after.pop("state"), before["state"], "state_dict")
    for what, value in after.items():
        assert value == before[what], f"{what} were {before[what]} and are {value}"


# The registration -------------------------------------------------------------------------------------


def describes_itself(point: Point) -> None:
    """The registration says what the method is."""
    for method in filter(None, (point.structure, point.init)):
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", method.name), f"the name {method.name!r}"
        assert method.title, "the title is empty"
        assert 1900 < method.year < 2100, f"the year {method.year}"
        assert re.fullmatch(r"(\d{4}\.\d{4,5})?", method.arxiv), f"the arXiv id {method.arxiv!r}"
        assert re.fullmatch(r"([\w.-]+/[\w.-]+)?", method.code), f"the repository {method.code!r}"
        assert method.formula, "the formula is empty"
        assert "\n" not in method.formula, "the formula has several lines"
        assert method.status in ("tested", "experimental"), f"the status {method.status!r}"
        assert method.doc, "its module has no docstring"
        assert method.build.__doc__, "its function has no docstring"
        unknown = set(method.traits.get("refuses", ())) - {host.name for host in (*SHAPES, *KINDS)}
        assert not unknown, f"it refuses {unknown}, of which the battery knows nothing"
        assert json.loads(json.dumps(method.to_dict()))["name"] == method.name


def declares_its_parts(point: Point) -> None:
    """What other axes act on is there, and nothing that was not declared."""
    if point.on_activations:
        return
    traits = point.structure.traits
    for expression in require(adapted(point, point.blocks(), point.targets)).expressions("default").values():
        pairs = list(expression.pairs())
        kinds = {"terms"} if any(pair.additive for pair in pairs) else {"parts"} if pairs else {""}
        assert {traits["pairs"]} == kinds, f"its pairs are {kinds}, not {traits['pairs']!r}"
        sides = {side for leaf, side in expression.sides() if isinstance(leaf.tensor(), nn.Parameter)}
        assert traits["sides"] == (sides == {"output", "input"}), f"its sides are {sides}"
        assert traits["entries"] == bool(list(expression.entries())), "entries is not what is there"


def refuses_other_inits(point: Point) -> None:
    """Starts that have no meaning are refused."""
    for init in rf.methods("init"):
        if not _accepts(point.structure, init, point.options):
            with pytest.raises(Incompatible, match=re.escape(init.name)):
                adapted(Point(point.structure, init, point.options), point.blocks(), point.targets)


# One layer --------------------------------------------------------------------------------------------


def refuses_aloud(point: Point, host: Host) -> None:
    """A layer that the registration excludes is refused in one sentence, and the model stays as it is."""
    model = host.model()
    before = snapshot(model)
    with pytest.raises(RankfoldError, match="layer") as refusal:
        adapted(point, model, host.path)
    assert point.structure.name in str(refusal.value), f"the method is not named: {refusal.value}"
    assert_untouched(model, before)


def starts_as_promised(point: Point, host: Host) -> None:
    """Step 0 is what was promised."""
    x, base = host.input(torch.float32), host.model(torch.float32)
    model, promise = adapted_layer(point, host, torch.float32), point.start
    if promise.square and len(set(expression_of(model).shape)) > 1:
        promise = EXACT_START
    assert_start(promise, model(x), base(x))


def assert_start(promise: StepZero, output: Tensor, base: Tensor) -> None:
    """Assert a step-0 promise."""
    if promise.kind == "exact":
        assert torch.equal(output, base), f"off by {(output - base).abs().max():.1e}"
    elif promise.kind == "near":
        assert_close(output, base, promise.tolerance, "the output at step 0")
    else:
        assert (output - base).abs().max() > 1e-4 * base.abs().max(), (
            f"{promise}, yet it is the base's output"
        )


def applies_its_matrix(point: Point, host: Host) -> None:
    """Apply equals dense, forward and backward."""
    model, x = disturbed(adapted_layer(point, host)), host.input()
    assert_applies_matrix(model, x)
    with torch.no_grad():
        for _ in range(2):
            assert_close(model(x), through_matrix(model, x), EXACT, "the output without gradients")


def assert_applies_matrix(model: nn.Module, x: Tensor) -> None:
    """Assert that output and gradients are those of the matrix."""
    tensors = [*trainable(model).values(), *([x] if x.requires_grad else [])]
    output, expected = model(x), through_matrix(model, x)
    assert_close(output, expected, EXACT, "the output")
    for actual, wanted, tensor in zip(
        gradients(output, tensors), gradients(expected, tensors), tensors, strict=True
    ):
        assert actual is not None, f"no gradient reaches a tensor of shape {tuple(tensor.shape)}"
        wanted = torch.zeros_like(tensor) if wanted is None else wanted
        assert_close(actual, wanted, EXACT, f"the gradient of shape {tuple(tensor.shape)}")


def parts_apply_their_matrices(point: Point, host: Host) -> None:
    """Every part applies its own matrix, also where the whole takes another order."""
    expression = expression_of(disturbed(adapted_layer(point, host)))
    parts = [m for m in expression.modules() if isinstance(m, Weight) and not isinstance(m, Leaf)]
    for part in parts:
        x = normal_tensor(3, part.shape[1]).requires_grad_()
        tensors = [x, *(p for p in part.parameters() if p.requires_grad)]
        output, expected = part(x), x @ part.dense().T
        assert_close(output, expected, EXACT, part.formula())
        for actual, wanted in zip(gradients(output, tensors), gradients(expected, tensors), strict=True):
            assert_close(actual, wanted, EXACT, f"a gradient of {part.formula()}")
        with torch.no_grad():
            assert_close(part(x), expected, EXACT, f"{part.formula()} without gradients")


def applies_at_the_largest_rank(point: Point) -> None:
    """Apply equals dense at the largest rank."""
    for host in (h for h in SHAPES if not point.refuses(h)):
        out, columns = host.model().layer.weight.shape
        model = adapted_layer(point, host, rank=point.largest_rank((out, columns)))
        assert_applies_matrix(disturbed(model), host.input())


def has_true_gradients(point: Point, host: Host) -> None:
    """Gradients are those of finite differences."""
    model, x = disturbed(adapted_layer(point, host)), host.input()
    for module in model.modules():
        if isinstance(module, Normalized | Competing | Spectral):
            module.detach = False  # what autograd takes for a constant has another gradient by design
    tensors = [*trainable(model).values(), *([x] if x.requires_grad else [])]

    def output(*_: Tensor) -> Tensor:
        return model(x)  # type: ignore[no-any-return]

    # The differences are taken by changing the model's own tensors in place.
    assert torch.autograd.gradcheck(output, tensors, atol=1e-6, rtol=1e-4, fast_mode=True)


def accepts_every_batch_shape(point: Point, host: Host) -> None:
    """Inputs may have any leading dimensions, none and empty included, and any strides."""
    model, x = disturbed(adapted_layer(point, host)), host.input().detach()
    whole = model(x)
    if host.kind == "linear":
        assert_close(model(x.flatten(0, -2)[0]), whole.flatten(0, -2)[0], EXACT, "one token")
        assert_close(model(x.mT.contiguous().mT), whole, EXACT, "a transposed input")
        assert_close(model(x[None, None]), whole[None, None], EXACT, "more dimensions")
        many = x.flatten(0, -2).repeat(40, 1)
        assert_close(model(many), whole.flatten(0, -2).repeat(40, 1), EXACT, "many tokens")
    if host.kind != "attention":
        assert model(x[:0]).shape == whole[:0].shape, "an empty batch"
        assert_close(model(x[:1]), whole[:1], EXACT, "a batch of one")


def has_its_transpose(point: Point, host: Host) -> None:
    """The transposed expression is the transposed matrix."""
    expression = expression_of(disturbed(adapted_layer(point, host)))
    matrix = expression.dense()
    x = normal_tensor(3, matrix.shape[0])
    assert_close(expression.T.dense(), matrix.T, EXACT, "the transpose")
    assert_close(expression.T(x), x @ matrix, EXACT, "applying the transpose")
    assert_close(expression.rows(torch.tensor([[0, 2]])), matrix[None, [0, 2]], EXACT, "rows")
    assert_close(expression.T.rows(torch.tensor([1])), matrix.T[[1]], EXACT, "rows of the transpose")


def normal_tensor(*shape: int, seed: int = 5) -> Tensor:
    """Return normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def folds(point: Point, host: Host) -> None:
    """Fold equals forward, and leaves plain layers."""
    model, x, plain = disturbed(adapted_layer(point, host)), host.input(), host.model()
    wanted = model(x)
    rf.fold(model)
    assert_close(model(x), wanted, EXACT, "the folded output")
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()], "layers are not plain"
    assert list(model.state_dict()) == list(plain.state_dict()), "names of the state_dict"


def is_removed(point: Point, host: Host) -> None:
    """Remove restores the model bit for bit."""
    model = host.model()
    before, frozen_bias = snapshot(model), next(iter(model.parameters()))
    assert_untouched(rf.remove(disturbed(adapted(point, model, host.path))), before)
    frozen_bias.requires_grad_(False)
    before = snapshot(model)
    adapted(point, model, host.path)(host.input()).sum().backward()
    assert_untouched(rf.remove(model), before)


def counts_itself(point: Point, host: Host) -> None:
    """Counted numbers are the real ones."""
    model = adapted_layer(point, host)
    expected = sum(p.numel() for p in trainable(model).values())
    planned = rf.plan(host.model(), point.recipe, targets=host.path, rank=point.rank)
    assert planned.trainable == rf.summary(model).trainable == expected
    kept = {place[0]: place for place in require(model).owned("default").items()}
    stored = sum(getattr(owner, name).numel() for _, (owner, name) in kept.values())
    stored += sum(value.numel() for value in require(model).whole("default").values())
    assert planned.stored == stored, f"the plan says {planned.stored} stored, it is {stored}"
    assert "*" in expression_of(model).formula(), "no leaf of the formula is marked as trained"


def counts_its_multiplications(point: Point) -> None:
    """Counted multiply-adds are those that a forward without gradients makes."""
    for host in (h for h in SHAPES if not point.refuses(h)):
        expression = expression_of(disturbed(adapted_layer(point, host)))
        for tokens in (1, 50):
            counted, real = expression.macs(tokens), multiplications(expression, tokens)
            assert real <= counted, f"{host.name}: {real} are made for {tokens} tokens, {counted} are counted"
            least = tokens * expression.shape[0] * expression.shape[1]
            least = 1 if point.is_scratch else least
            assert real >= least, f"{host.name}: {real} cannot be right"


def multiplications(expression: Weight, tokens: int) -> int:
    """Return the multiply-adds in matrix products of a forward without gradients, its caches filled."""
    x = normal_tensor(tokens, expression.shape[1])
    with torch.no_grad():
        expression(x)
        with FlopCounterMode(display=False) as counter:
            expression(x)
    return int(counter.get_total_flops()) // 2


def applies_to_many_tokens(point: Point) -> None:
    """Apply equals dense, forward and backward, where tokens are many and another order is the cheapest."""
    assert_applies_matrix(disturbed(adapted_layer(point, LARGE)), LARGE.input())


def keeps_little_for_backward(point: Point, tokens: int) -> None:
    """What autograd keeps is at most that of the dense way, and 1.6 times that of the frozen layer.

    To both are added four numbers for every token and unit of rank, the method's own small activations.
    The layer stands between functions that keep what they are given, as most layers do; so the frozen model
    keeps input and output, but not what the layer itself is given.
    """
    model, frozen = disturbed(adapted_layer(point, LARGE, torch.float32)).train(), LARGE.model(torch.float32)
    x, expression = torch.randn(tokens, 48, requires_grad=True), expression_of(model)
    kept = kept_for_backward(model, model, x)
    dense = kept_for_backward(lambda hidden: F.linear(hidden, expression.dense().to(hidden.dtype)), model, x)
    floor = kept_for_backward(frozen.requires_grad_(False), frozen, x)
    own = 4 * tokens * (point.rank or 0) * x.element_size()
    if point.options.get("dropout"):
        own += x.nbytes + x.numel()  # of every input, what is let through and where
    assert kept <= dense + own, f"{kept} bytes are kept, {dense} if the matrix is formed"
    assert kept <= 1.6 * floor + own, f"{kept} bytes are kept, {floor} by the frozen layer"


def kept_for_backward(layer: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> int:
    """Return the bytes that autograd keeps, every memory once, the model's own tensors left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = F.silu(layer(F.silu(x)))  # alive until all is counted, so that no address comes twice
    assert output.requires_grad
    return sum(found.values())


LAYER_CHECKS = (
    starts_as_promised,
    applies_its_matrix,
    parts_apply_their_matrices,
    has_true_gradients,
    accepts_every_batch_shape,
    has_its_transpose,
    folds,
    is_removed,
    counts_itself,
)


# There is no base to go back to, and a start may keep all of a small weight.
NOT_FROM_SCRATCH = (is_removed, starts_as_promised)


# The whole model --------------------------------------------------------------------------------------


def starts_as_promised_in_blocks(point: Point) -> None:
    """Step 0 of a whole model is what was promised."""
    ids = token_ids()
    model = adapted(point, point.blocks(), point.targets)
    assert_start(point.start, model(ids), point.blocks()(ids))


def trains_what_it_declares(point: Point) -> None:
    """Gradients reach exactly what is declared to train."""
    model = adapted(point, point.blocks(), point.targets)
    disturbed(model, size=0.03)  # so that nothing is saturated
    adaptation = require(model)
    places = {id(getattr(owner, name)): key for key, (owner, name) in adaptation.owned("default").items()}
    if point.is_scratch:
        places |= {id(parameter): name for name, parameter in model.named_parameters()}
    loss_gradients(model, token_ids())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in places), f"{name}: requires_grad"
        grad = parameter.grad
        assert parameter.requires_grad or grad is None, f"{name} is frozen and got a gradient"
        if parameter.requires_grad and id(parameter) not in learning_apart(model):
            assert grad is not None, f"{name} got no gradient"
            assert grad.isfinite().all(), f"{name} got a gradient that is not finite"
            assert grad.any(), f"{name} got a gradient of zeros"
    total = sum(p.numel() for p in trainable(model).values())
    planned = rf.plan(point.blocks(), point.recipe, targets=point.targets, rank=point.rank, **point.data)
    assert rf.summary(model).trainable == planned.trainable == total


def learns(point: Point) -> None:
    """A few steps of training lower the loss."""
    point = replace(point, options={**point.options, **SOON.get(point.structure.name, {})})
    model, ids = adapted(point, point.blocks(), point.targets).train(), token_ids()
    wanted = point.blocks()(ids).detach() + torch.randn(
        3, ids.shape[1], 4, generator=torch.Generator().manual_seed(2)
    )
    optimizer = torch.optim.Adam(trainable(model).values(), lr=0.02)
    with torch.random.fork_rng(devices=[]), rf.attach(model, optimizer, total_steps=25):
        losses = [_step(model, optimizer, ids, wanted) for _ in range(25)]
    assert losses[-1] < 0.98 * losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, wanted: Tensor) -> float:
    optimizer.zero_grad()
    loss = (model(ids) - wanted).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def is_the_change_where_its_gate_is_open(point: Point) -> None:
    """A gated term is its matrix where the gate is open, and nothing where it is closed."""
    if not point.is_gated or point.on_activations:
        return
    model, ids = adapted_blocks(point, torch.float64).eval(), token_ids()
    model(ids)
    path, expression = next(iter(require(model).expressions("default").items()))
    x = normal_tensor(*ids.shape, expression.shape[1])
    with require(model).carrier.gates.held():
        _check_gates(path, expression, x)


def _check_gates(path: str, expression: Weight, x: Tensor) -> None:
    assert_close(expression(x), _gated(expression, x), EXACT, f"{path} by its gate")
    gated = [m for m in expression.modules() if isinstance(m, Gated)]
    if gated:
        open_at = torch.stack([m.gates.read(m.key, x)[..., m.expert] for m in gated]).bool()
        assert open_at.any(), "the gates are closed everywhere"
        assert not open_at.all(), "the gates are open everywhere"
        closed = ~open_at.any(0).expand(x.shape[:-1])
        plain = Sum(*(term for term in expression.parts() if not isinstance(term, Gated)))  # type: ignore[operator]
        assert torch.equal(expression(x)[closed], plain(x)[closed]), "a closed gate lets through"


def _gated(expression: Weight, x: Tensor) -> Tensor:
    assert isinstance(expression, Sum), "a gate stands on the terms of a sum"
    total = torch.zeros((), dtype=x.dtype)
    for term in expression.parts():
        factor: Any = 1.0
        while isinstance(term, Scaled):
            factor, term = factor * term.factor(), term.inner
        if isinstance(term, Gated):
            gate = term.gates.read(term.key, x)[..., term.expert, None]
            total = total + factor * gate * (x @ term.inner.dense().T)
        elif isinstance(term, Experts):
            gates = term.choose.gates_for(x)
            ups = term.up.tensor().chunk(gates.shape[-1], 1)
            downs = term.down.tensor().chunk(gates.shape[-1], 0)
            for e, (up, down) in enumerate(zip(ups, downs, strict=True)):
                total = total + factor * gates[..., e, None] * (x @ down.T @ up.T)
        else:
            total = total + factor * (x @ term.dense().T)
    return total


def folds_in_blocks(point: Point) -> None:
    """Fold equals forward in a whole model, or is refused aloud where there is no matrix."""
    model, ids = adapted_blocks(point), token_ids()
    wanted = model(ids)
    if not point.has_matrix:
        before = snapshot(model)
        with pytest.raises(NotDense, match=r"cannot be folded|no dense matrix"):
            rf.fold(model)
        assert_untouched(model, before)
        assert torch.equal(model(ids), wanted)
        return
    rf.fold(model)
    assert_close(model(ids), wanted, 1e-4, "the folded output")
    assert list(model.state_dict()) == list(point.blocks().state_dict()), "names of the state_dict"


def is_removed_from_blocks(point: Point) -> None:
    """Remove restores a whole model bit for bit."""
    model, ids = point.blocks(), token_ids()
    list(model.parameters())[1].requires_grad_(False)
    before, wanted = snapshot(model), model(ids)
    adapted(point, model, point.targets)
    loss_gradients(disturbed(model), ids)
    rf.remove(model)
    assert_untouched(model, before)
    assert torch.equal(model(ids), wanted)
    assert not any("rankfold" in key for module in model.modules() for key in module.__dict__)


def copies_are_apart(point: Point) -> None:
    """A deep copy and a pickled copy share nothing with the model."""
    model, ids = adapted_blocks(point), token_ids()
    wanted = model(ids).detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own bytes
        assert torch.equal(twin(ids), wanted), "the copy gives another output"
        shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
        assert not shared, "the copy shares memory with the model"
        loss_gradients(twin, ids)
        assert all(p.grad is None for p in model.parameters()), "the copy's gradients reach the model"
        disturbed(twin, seed=8)
        assert not torch.equal(twin(ids), wanted), "the copy does not follow its own parameters"
        assert torch.equal(model(ids), wanted), "the model follows the copy's parameters"


class Draws(TorchDispatchMode):
    """Notes which random operations run, and whether any draws from the global generator."""

    _NAMES = (
        "rand",
        "randn",
        "randint",
        "randperm",
        "normal",
        "normal_",
        "uniform_",
        "bernoulli",
        "multinomial",
    )

    def __init__(self) -> None:
        super().__init__()
        self.seeded, self.unseeded = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__.removesuffix("_like") in self._NAMES:
            given = any(isinstance(a, torch.Generator) for a in (*args, *(kwargs or {}).values()))
            self.seeded, self.unseeded = self.seeded + given, self.unseeded + (not given)
        return func(*args, **(kwargs or {}))


def start_values(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor that the adapter brought, the fixed ones included."""
    adaptation: Adaptation = require(model)
    found = {key: getattr(owner, name) for key, (owner, name) in adaptation.owned("default").items()}
    for path, expression in adaptation.expressions("default").items():
        leaves = [leaf for leaf in expression.leaves() if leaf.name != "W0"]
        found.update({f"{path}:{leaf.name}": leaf.tensor() for leaf in leaves})
    return {key: value.detach().clone() for key, value in found.items()}


def is_determined_by_its_seed(point: Point) -> None:
    """The seed alone determines the adapter, and global generators are not touched."""
    torch_state, python_state, numpy_state = (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(legacy=True),  # noqa: NPY002 - that it is not touched is the point
    )
    model = point.blocks()
    with Draws() as draws:
        adapted(point, model, point.targets, seed=3)
    first = start_values(model)
    assert torch.equal(torch.get_rng_state(), torch_state), "torch's global generator was used"
    assert random.getstate() == python_state, "Python's global generator was used"
    assert np.array_equal(np.random.get_state(legacy=True)[1], numpy_state[1]), "numpy's was used"  # noqa: NPY002
    assert not draws.unseeded, "something was drawn without a generator"
    assert_same(start_values(adapted(point, point.blocks(), point.targets, seed=3)), first, "the same seed")
    other = start_values(adapted(point, point.blocks(), point.targets, seed=4))
    differs = any(not torch.equal(other[key], first[key]) for key in first)
    assert differs == bool(draws.seeded), (
        f"another seed {'changed' if differs else 'did not change'} the start"
    )


def starts_each_weight_by_itself(point: Point) -> None:
    """A weight's start does not depend on which others are adapted."""
    if point.structure.traits["plan"] is not None:
        return
    all_of_them = start_values(adapted(point, point.blocks(), point.targets))
    path = sorted(all_of_them)[-1].partition(":")[0]
    alone = start_values(adapted(point, point.blocks(), path))
    assert_same(alone, {key: all_of_them[key] for key in alone}, "adapted alone")


def keeps_float32_over_bfloat16(point: Point) -> None:
    """Over a bfloat16 base factors and gradients are float32, and results close to float32's."""
    ids = token_ids()
    half, full = point.blocks(torch.bfloat16), point.blocks(torch.bfloat16).float()
    half, full = (disturbed(adapted(point, model, point.targets)) for model in (half, full))
    wrong = [name for name, p in trainable(half).items() if p.dtype != torch.float32]
    assert not wrong, f"{wrong} are not float32"
    output, wanted = half(ids), full(ids)
    assert output.dtype == torch.bfloat16, f"the output is {output.dtype}"
    assert_close(output, wanted, half_of(point), "the output")
    assert_gradients_close(loss_gradients(half, ids), loss_gradients(full, ids), 2 * half_of(point))


def assert_gradients_close(
    actual: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float
) -> None:
    """Assert float32, finite gradients that point the same way."""
    for name, grad in actual.items():
        assert grad.dtype == torch.float32, f"the gradient of {name} is {grad.dtype}"
        assert grad.isfinite().all(), f"the gradient of {name} is not finite"
    flat, expected = (torch.cat([g.flatten() for g in each.values()]) for each in (actual, wanted))
    error = (flat - expected).norm() / expected.norm()
    assert error < tolerance, f"the gradients are off by {error:.1e} of their norm"


def runs_under_autocast(point: Point) -> None:
    """Under bfloat16 autocast it runs, close to float32, with float32 gradients."""
    model, ids = adapted_blocks(point), token_ids()
    wanted, expected = model(ids).detach(), loss_gradients(model, ids)
    few = ids[:1, :2]  # they take another order of evaluation
    wanted_few = model(few).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(model(ids), wanted, half_of(point), "the output")
        assert_close(model(few), wanted_few, half_of(point), "the output for few tokens")
        actual = loss_gradients(model, ids)
    assert_gradients_close(actual, expected, 2 * half_of(point))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert_close(model(ids), wanted, half_of(point), "the output without gradients")
    assert_close(model(ids), wanted, 1e-6, "the output after autocast")


def compiles(point: Point) -> None:
    """It compiles to one graph that gives the same output and gradients."""
    model, ids = adapted_blocks(point), token_ids()
    expected, wanted = model(ids).detach(), loss_gradients(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=point.structure.traits["one_graph"], backend="aot_eager")
    assert_close(compiled(ids), expected, 1e-5, "the compiled output")
    model.zero_grad()
    compiled(ids).square().mean().backward()
    for name, parameter in trainable(model).items():
        assert (parameter.grad is not None) == (name in wanted), f"no gradient reaches {name}"
        if parameter.grad is not None:
            assert_close(parameter.grad, wanted[name], 1e-4, f"the compiled gradient of {name}")
    torch._dynamo.reset()


def is_called_functionally(point: Point) -> None:
    """torch.func.functional_call uses the tensors that it is given."""
    model, ids = adapted_blocks(point), token_ids()
    before = model(ids)
    given = {name: p.detach() + 0.1 for name, p in trainable(model).items()}
    output = functional_call(model, given, (ids,))
    assert torch.equal(model(ids), before), "the model was changed"
    assert not torch.equal(output, before), "the tensors were not used"
    model.load_state_dict(given, strict=False)
    assert_close(output, model(ids), 1e-6, "the output")
    with torch.no_grad():
        assert_close(functional_call(model, given, (ids,)), output, 1e-6, "the output without gradients")


def keeps_its_state(point: Point) -> None:
    """A state_dict holds the whole state, and the base keeps its names in it."""
    model, ids = adapted_blocks(point), token_ids()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    gone = {f"{path}.weight" for path in require(model).adapter().paths} if point.is_scratch else set()
    assert set(point.blocks().state_dict()) - gone <= set(state), "names of the base are missing"
    assert not gone & set(state), "the weights are still there"
    other = adapted(point, point.blocks(), point.targets)
    with torch.no_grad():
        assert not torch.equal(other(ids), model(ids))
    other.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert torch.equal(other(ids), model(ids))


def sees_every_change(point: Point) -> None:
    """What is kept without gradients never outlives a change of the weights."""
    model, ids = adapted_blocks(point), token_ids()
    for change in (_in_place, _by_optimizer, _by_loading, _by_data, _of_the_base):
        with torch.no_grad():
            model(ids), model(ids)
        change(model)
        fresh = adapted(point, point.blocks(), point.targets)
        fresh.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert_close(model(ids), fresh(ids), 1e-5, f"the output after a change {change.__name__}")


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1)


def _by_optimizer(model: nn.Module) -> None:
    model.zero_grad()
    model(token_ids()).sum().backward()
    torch.nn.utils.clip_grad_norm_(trainable(model).values(), 1.0)  # a large scaling would overflow
    torch.optim.SGD(trainable(model).values(), lr=0.1).step()


def _by_loading(model: nn.Module) -> None:
    state = model.state_dict()  # positions are no numbers to be scaled
    model.load_state_dict({k: 1.1 * v if v.is_floating_point() else v for k, v in state.items()})


def _by_data(model: nn.Module) -> None:
    model.train()
    for parameter in trainable(model).values():
        parameter.data = parameter.data + 0.1
    model.eval()


def _of_the_base(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def is_saved(point: Point) -> None:
    """Saving and loading restores the adapter bit for bit, and saving again writes the same bytes."""
    model, ids = adapted_blocks(point), token_ids()
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "first"), Path(folder, "second")
        rf.save(model, first)
        loaded = rf.load(point.blocks(), first)
        assert torch.equal(loaded(ids), model(ids)), "the loaded model gives another output"
        assert list(trainable(loaded)) == list(trainable(model)), "other parameters train"
        assert_same(start_values(loaded), start_values(model), "loaded")
        rf.save(loaded, second)
        for file in sorted(first.iterdir()):
            assert file.read_bytes() == (second / file.name).read_bytes(), f"{file.name} differs"


def shares_the_model(point: Point) -> None:
    """Two adapters live in one model, each as if it were alone."""
    ids, base = token_ids(), point.blocks()(token_ids())
    model = adapted_blocks(point, name="one")
    first = model(ids).detach()
    disturbed(adapted(point, model, point.targets, name="two", seed=1), seed=9)
    second = model(ids).detach()
    assert not torch.equal(first, second)
    alone = disturbed(adapted(point, point.blocks(), point.targets, name="two", seed=1), seed=9)
    assert_close(second, alone(ids).detach(), 1e-6, "the second adapter")
    assert torch.equal(rf.use(model, "one")(ids), first), "the first adapter, used again"
    _use_both(point, model, ids)
    with rf.disabled(model):
        assert torch.equal(model(ids), base), "the model without its adapters"
    rf.use(rf.remove(model, "two"), "one")
    assert torch.equal(model(ids), first), "the first adapter, the second removed"
    assert torch.equal(rf.remove(model)(ids), base)


def _use_both(point: Point, model: nn.Module, ids: Tensor) -> None:
    try:
        rf.use(model, ["one", "two"])
    except Incompatible:
        return
    both = copy.deepcopy(model)
    together = both(ids)
    with torch.no_grad():
        assert_close(both(ids), together, 1e-5, "both adapters without gradients")
        for owner, name in require(both).owned("one").values():  # the one below
            if getattr(owner, name).is_floating_point():
                getattr(owner, name).mul_(1.5)
        kept = both(ids)
    assert_close(kept, both(ids).detach(), 1e-5, "both adapters without gradients, after a change")
    loss_gradients(both, ids)
    if point.has_matrix:
        together = both(ids)
        assert_close(rf.fold(both)(ids), together, 1e-4, "both adapters folded")


def is_checkpointed(point: Point) -> None:
    """Gradient checkpointing changes no gradient, also with two forwards before one backward."""
    model, batches = adapted_blocks(point), (token_ids(0), token_ids(1))
    wanted = loss_gradients(model, *batches)
    for reentrant in (False, True):
        model.reentrant = reentrant
        for name, grad in loss_gradients(model, *batches).items():
            assert_close(grad, wanted[name], 1e-5, f"the gradient of {name}, use_reentrant={reentrant}")


def is_moved(point: Point) -> None:
    """A change of the model's dtype after adapting is followed."""
    model, ids = adapted_blocks(point), token_ids()
    wanted = model(ids).detach()
    with torch.no_grad():
        model(ids)
        assert_close(model.double()(ids), wanted, 1e-5, "the output in float64")
        assert_close(model.bfloat16()(ids), wanted, 2 * half_of(point), "the output in bfloat16")
    loss_gradients(model, ids)


def refuses_bad_input(point: Point) -> None:
    """Impossible ranks and options are refused in one sentence, and the model stays as it is."""
    model = point.blocks()
    before = snapshot(model)
    bad: list[dict[str, Any]] = [{"rank": 0}, {"rank": -1}, {"rank": True}, {"rank": 2.5}, {"unheard_of": 1}]
    bad += [{name: float("nan")} for name, default in point.structure.options.items() if _is_number(default)]
    bad += [{"alpha": value} for value in (0, -1.0, float("nan")) if "alpha" in point.structure.options]
    bad += [{"dropout": value} for value in (-0.1, 1.0, 2) if "dropout" in point.structure.options]
    if point.structure.traits["limit"] and not point.on_activations:
        bad.append({"rank": 1000 * (point.rank or 1)})
    if point.rank and point.structure.traits["multiple"](point._filled) > 1:
        bad.append({"rank": point.rank + 1})
    for arguments in bad:
        with pytest.raises(RankfoldError) as refusal:
            _adapt_with(point, model, arguments)
        assert str(refusal.value), f"{arguments} are refused without a word"
        assert_untouched(model, before)


def _is_number(value: Any) -> bool:
    return isinstance(value, float)


def _adapt_with(point: Point, model: nn.Module, arguments: dict[str, Any]) -> None:
    given = {k: v for k, v in arguments.items() if k != "rank"}
    recipe = rf.Recipe((point.structure.name, {**point.options, **given}), point.recipe.init)
    rf.adapt(model, recipe, targets=point.targets, rank=arguments.get("rank", point.rank), **point.data)


MODEL_CHECKS = (
    starts_as_promised_in_blocks,
    trains_what_it_declares,
    learns,
    is_the_change_where_its_gate_is_open,
    folds_in_blocks,
    is_removed_from_blocks,
    copies_are_apart,
    is_determined_by_its_seed,
    starts_each_weight_by_itself,
    keeps_float32_over_bfloat16,
    runs_under_autocast,
    compiles,
    is_called_functionally,
    keeps_its_state,
    sees_every_change,
    is_saved,
    shares_the_model,
    is_checkpointed,
    is_moved,
    refuses_bad_input,
)


def lets_go_of_the_weight(point: Point) -> None:
    """The usual start's memory is let go, and whatever would go back to it is refused in one sentence."""
    model, ids = point.blocks(), token_ids()
    kept = [weakref.ref(p) for n, p in model.named_parameters() if n.endswith("weight")]
    before = sum(p.numel() for p in model.parameters())
    adapted(point, model, point.targets)
    gc.collect()
    gone = sum(ref() is None for ref in kept)
    assert gone >= len(require(model).adapter().paths), f"{gone} weights are let go"
    disturbed(model)
    wanted = model(ids).detach()
    for act in (rf.remove, lambda m: rf.use(m, []), lambda m: rf.adapt(m, "lora", rank=1, name="other")):
        with pytest.raises(Incompatible, match="fold"):
            act(model)
        assert torch.equal(model(ids), wanted), "a refusal changed the model"
    count = rf.count(model)
    assert count.stored == sum(t.numel() for t in model.state_dict().values())
    assert count.active == sum(p.numel() for p in model.parameters())
    if point.has_matrix:
        rf.fold(model)
        assert sum(p.numel() for p in model.parameters()) == before


NEEDS_A_BASE = (is_removed_from_blocks, shares_the_model, keeps_float32_over_bfloat16)
SCRATCH_CHECKS = (*(check for check in MODEL_CHECKS if check not in NEEDS_A_BASE), lets_go_of_the_weight)
__all__ = ["Check", "Point", "check_method", "check_point", "points"]
