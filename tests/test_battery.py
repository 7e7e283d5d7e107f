"""Every method of the catalogue passes the generic battery, and the battery finds what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from battery import Check, check_method
from torch import Tensor, nn

import rankfold as rf
from rankfold import catalogue
from rankfold.methods import registry
from rankfold.methods.registry import near_base, structure
from rankfold.methods.site import Site
from rankfold.weights import Dense, Leaf, Weight, frozen


def _parameters(checks: list[Check]) -> list[Any]:
    return [pytest.param(c, id=str(c), marks=[pytest.mark.slow] if c.is_slow else []) for c in checks]


@pytest.mark.filterwarnings("ignore::rankfold.layers.adaptation.NeverAttached")
@pytest.mark.parametrize(
    "check",
    [
        p
        for axis in ("structure", "pretrain")
        for method in rf.methods(axis)
        if "scratch" in method.traits
        for p in _parameters(check_method(method.name))
    ],
)
def test_every_method_keeps_its_promises(check: Check) -> None:
    check()


# With other options than the defaults: those that change what is computed.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("abba", {"alpha": 3.0}),
    ("diablo", {"blocks": 1}),
    ("diablo", {"blocks": 3}),
    ("dora", {"alpha": 5.0, "rank_stabilised": True}),
    ("flora-tucker", {"window_rank": 1, "alpha": 3.0}),
    ("gralora", {"k": 1}),
    ("gralora", {"hybrid_rank": 1}),
    ("lora", {"alpha": 5.0}),
    ("lora", {"dropout": 0.1}),
    ("lora", {"rank_stabilised": True}),
    ("lora-xs", {"std": 0.1}),
    ("losia-pro", {"factor": 0.5}),
    ("uni-lora", {"length": 7}),
    ("vera", {"d_initial": 1.0}),
]
# A variant of a kind is checked in what depends on the arithmetic.
SENTENCES = (
    "apply equals dense",
    "gradients are",
    "counted",
    "keeps no more",
    "fold equals",
    "remove",
    "saving",
    "under bfloat16",
)


def _variant_checks() -> Iterator[Check]:
    for name, options in VARIANTS:
        for check in check_method(name, **options):
            if check.point.is_own and check.name.startswith(SENTENCES) and _is_possible(check, options):
                yield check


def _is_possible(check: Check, options: dict[str, Any]) -> bool:
    # One block divides everything, and what reads its weight as a matrix has no place for dropout.
    return not check.name.startswith("refuses") and not (options.get("dropout") and "attention" in check.name)


@pytest.mark.parametrize("check", _parameters(list(_variant_checks())))
def test_options_do_not_break_a_promise(check: Check) -> None:
    check()


# The battery itself -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _catalogue() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before = dict(catalogue._METHODS)
    yield
    catalogue._METHODS.clear()
    catalogue._METHODS.update(before)


def enter(build: Callable[..., Weight], **about: Any) -> None:
    given = {"title": "Toys", "year": 2024, "formula": "W = W0 + B A", "init": "kaiming", "starts": ("zero",)}
    structure("toy", **{**given, **about})(build)


def failures(sentence: str) -> list[str]:
    """Run the toy's checks whose name begins so, and return what the failing ones say."""
    chosen = [check for check in check_method("toy") if check.name.startswith(sentence)]
    assert chosen, f"no check begins with {sentence!r}"
    found = []
    for check in chosen:
        try:
            check()
        except (AssertionError, Exception, pytest.fail.Exception) as failure:
            found.append(f"{check}: {failure}")
    return found


def test_a_method_of_somebody_else_passes_by_being_registered() -> None:
    def build(site: Site, rank: int) -> Weight:
        """Return W0 + B A."""
        return site.base + site.low_rank(rank, 1.0)

    enter(build, pairs="terms", sides=True, entries=True)
    assert failures("") == []


class Wrong(Weight):
    """A product of leaves with one mistake."""

    def __init__(self, up: Leaf, down: Leaf) -> None:
        super().__init__((up.shape[0], down.shape[1]))
        self.up, self.down = up, down

    def dense(self) -> Tensor:
        return self.up.tensor() @ self.down.tensor()

    def map(self, x: Tensor) -> Tensor:
        return x @ self.dense().to(x.dtype).T

    def macs(self, tokens: int) -> int:
        return tokens * self.up.shape[1] * sum(self.shape)

    def dense_macs(self) -> int:
        return self.up.shape[1] * self.shape[0] * self.shape[1]

    def formula(self) -> str:
        return f"{self.up.formula()} @ {self.down.formula()}"


class WrongOutput(Wrong):
    def map(self, x: Tensor) -> Tensor:
        return 1.001 * super().map(x)


class WrongGradient(Wrong):
    def map(self, x: Tensor) -> Tensor:
        return super().map(x) + super().map(x).detach() - super().map(x.detach())


class WrongWithoutGradients(Wrong):
    def map(self, x: Tensor) -> Tensor:
        return super().map(x) * (1 if torch.is_grad_enabled() else 1.001)


class WrongRows(Wrong):
    def rows(self, ids: Tensor) -> Tensor:
        return self.dense()[ids].flip(-1)


class WrongTranspose(Wrong):
    @property
    def T(self) -> Weight:
        return WrongOutput(Dense(self.down.tensor().T, "a", trainable=True), frozen(self.up.tensor().T, "b"))


class Stale(Wrong):
    def dense(self) -> Tensor:
        if torch.is_grad_enabled():
            return super().dense()
        if "kept" not in self.__dict__:
            self.__dict__["kept"] = super().dense()
        return self.__dict__["kept"]  # type: ignore[no-any-return]


class Shared(Wrong):
    def __init__(self, up: Leaf, down: Leaf) -> None:
        super().__init__(up, down)
        self.read = lambda: up.tensor()  # a closure points at the original after a deep copy

    def dense(self) -> Tensor:
        return self.read() @ self.down.tensor()


class NeverFormed(Wrong):
    def dense_macs(self) -> int:
        return 10**9


class Breaking(NeverFormed):
    def map(self, x: Tensor) -> Tensor:
        return super().map(x) * float(bool(x.sum() > -1e9))


class OnlyMatrices(Wrong):
    def map(self, x: Tensor) -> Tensor:
        return torch.mm(x.reshape(6, -1), self.dense().to(x.dtype).T).reshape(*x.shape[:-1], -1)


class Undercounted(Wrong):
    def macs(self, tokens: int) -> int:
        return 0


class Hoarding(NeverFormed):
    def map(self, x: Tensor) -> Tensor:
        return super().map(x.exp().log())


class HalfPrecision(Wrong):
    def map(self, x: Tensor) -> Tensor:
        return super().map(x.half()).to(x.dtype) if x.dtype == torch.bfloat16 else super().map(x)

    def dense(self) -> Tensor:
        return super().dense() * 1e5


MISTAKES = [
    (WrongOutput, "apply equals dense"),
    (WrongOutput, "every part applies"),
    (WrongGradient, "apply equals dense"),
    (WrongGradient, "every part applies"),
    (WrongGradient, "gradients are those of finite differences"),
    (WrongWithoutGradients, "apply equals dense"),
    (WrongRows, "apply equals dense, forward and backward: embedding"),
    (WrongTranspose, "the transposed expression"),
    (WrongOutput, "fold equals forward"),
    (Stale, "what is kept without gradients"),
    (Shared, "a deep copy"),
    (Breaking, "it compiles"),
    (OnlyMatrices, "inputs may have any"),
    (Undercounted, "counted multiply-adds"),
    (Hoarding, "keeps no more"),
    (HalfPrecision, "over a bfloat16 base"),
]


@pytest.mark.parametrize(("mistake", "sentence"), MISTAKES)
def test_a_wrong_map_is_found(mistake: Callable[[Leaf, Leaf], Weight], sentence: str) -> None:
    def build(site: Site, rank: int) -> Weight:
        """Return W0 + B A."""
        return site.base + site.change(site.factors(rank), 1.0, form=mistake)

    enter(build)
    assert failures(sentence)


def test_a_false_promise_of_step_0_is_found() -> None:
    def build(site: Site, rank: int) -> Weight:
        """Return a change that does not start at zero."""
        up = site.trained(site.normal("up", site.shape[0], rank), "up")
        return site.base + up @ site.trained(site.normal("down", rank, site.shape[1]), "down")

    enter(build)
    assert failures("step 0")
    enter(build, start=near_base(1e-3))
    assert failures("step 0")
    enter(build, start=registry.not_base("something else"))
    assert not failures("step 0")
    enter(lambda site, rank: site.base + site.low_rank(rank, 1.0), start=registry.not_base("another"))
    assert failures("step 0")


def test_a_start_drawn_from_the_global_generator_is_found() -> None:
    def build(site: Site, rank: int) -> Weight:
        """Return a change whose start nobody can repeat."""
        up = site.trained(site.zeros(site.shape[0], rank), "up")
        return site.base + up @ site.trained(torch.randn(rank, site.shape[1]), "down")

    enter(build)
    assert failures("the seed alone")


def test_a_start_that_ignores_the_seed_or_the_path_is_found() -> None:
    def build(site: Site, rank: int) -> Weight:
        """Return a change that starts alike whatever the seed."""
        drawn = torch.randn(rank, site.shape[1], generator=torch.Generator().manual_seed(0))
        return site.base + site.trained(site.zeros(site.shape[0], rank), "up") @ site.trained(drawn, "down")

    enter(build)
    assert failures("the seed alone")
    generator = torch.Generator()

    def in_order(site: Site, rank: int) -> Weight:
        """Return a change that depends on how many were built before."""
        drawn = torch.randn(rank, site.shape[1], generator=generator)
        return site.base + site.trained(site.zeros(site.shape[0], rank), "up") @ site.trained(drawn, "down")

    enter(in_order)
    assert failures("a weight's start does not depend")


def test_a_trained_leaf_without_effect_and_a_thawed_base_are_found() -> None:
    class Idle(Wrong):
        def dense(self) -> Tensor:
            return 0 * self.up.tensor().detach() @ self.down.tensor()

    enter(lambda site, rank: site.base + site.change(site.factors(rank), 1.0, form=Idle))
    assert failures("gradients reach exactly")

    def thaw(site: Site, rank: int) -> Weight:
        """Return a change, and let the base train."""
        assert site.layer is not None
        site.layer._parameters["weight"].data.mul_(1.01)  # type: ignore[union-attr]
        return site.base + site.low_rank(rank, 1.0)

    enter(thaw)
    assert failures("remove restores")


def test_a_change_that_does_not_learn_is_found() -> None:
    enter(lambda site, rank: site.base + site.change(_two_zeros(site, rank), 1.0))
    assert failures("a few steps of training")


def _two_zeros(site: Site, rank: int) -> Any:
    factors = site.factors(rank)
    return type(factors)(torch.zeros_like(factors.up), torch.zeros_like(factors.down))


def test_an_undeclared_refusal_and_a_false_one_are_found() -> None:
    def even(site: Site, rank: int) -> Weight:
        """Return a change of weights with even sides."""
        if any(side % 2 for side in site.shape):
            raise rf.errors.InvalidOption(f"{site.path}: toy needs even sides of the layer")
        return site.base + site.low_rank(rank, 1.0)

    enter(even)
    assert failures("apply equals dense, forward and backward: odd")
    enter(even, refuses=("odd",))
    assert not failures("refuses aloud: odd")
    enter(lambda site, rank: site.base + site.low_rank(rank, 1.0), refuses=("odd",))
    assert failures("refuses aloud: odd")


def test_a_refusal_that_is_not_ours_or_leaves_traces_is_found() -> None:
    def crashes(site: Site, rank: int) -> Weight:
        """Fail on odd sides."""
        if any(side % 2 for side in site.shape):
            raise ZeroDivisionError(f"{site.path}: toy, layer")
        return site.base + site.low_rank(rank, 1.0)

    enter(crashes, refuses=("odd",))
    assert failures("refuses aloud: odd")

    def marks(site: Site, rank: int) -> Weight:
        """Leave a mark on the model before refusing."""
        assert site.layer is not None
        site.layer.original.weight.data.add_(1)  # type: ignore[operator,union-attr]
        raise rf.errors.InvalidOption(f"{site.path}: toy needs another layer")

    enter(marks, refuses=("odd",))
    assert failures("refuses aloud: odd")


def test_a_parameter_that_is_no_leaf_is_found() -> None:
    class Hidden(Wrong):
        def __init__(self, up: Leaf, down: Leaf) -> None:
            super().__init__(up, down)
            self.extra = nn.Parameter(torch.randn(up.shape[0], down.shape[1]))

        def dense(self) -> Tensor:
            return super().dense() + self.extra.to(self.up.tensor().dtype)

    enter(lambda site, rank: site.base + site.change(site.factors(rank), 1.0, form=Hidden))
    assert failures("saving")
    assert failures("the seed alone")


def test_an_undescribed_method_is_found() -> None:
    for about in (
        {"title": ""},
        {"year": 20},
        {"arxiv": "24.1"},
        {"formula": ""},
        {"refuses": ("unheard of",)},
    ):
        enter(lambda site, rank: site.base + site.low_rank(rank, 1.0), **about)
        assert failures("the registration")
