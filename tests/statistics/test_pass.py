"""What a pass leaves as it was, shares, holds in memory, skips, and continues."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from rankfold.errors import (
    BaseMismatch,
    FormatError,
    Incompatible,
    InvalidOption,
    MissingPath,
    UnsupportedLayer,
)
from rankfold.statistics import REDUCERS, NotCollected, NotFinite, Statistics, collect, sequentially
from rankfold.statistics.reducers import Reducer, Seen, reducer
from rankfold.statistics.storage import tensors_of

Batches = list[dict[str, Tensor]]
EVERYTHING: list[Any] = [
    "input_mean", "input_gram", ("input_gram", {"per_sample": "max"}), "column_norm", "output_mean",
    "output_gram", "gradient", "squared_gradient", "squared_gradient_rows", "squared_gradient_columns",
    "sensitivity", ("input_pca", {"components": 4}), ("hessian_diagonal", {"samples": 2}),
]  # fmt: skip


def same(first: Statistics, second: Statistics) -> None:
    one, other = tensors_of(first), tensors_of(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert str(first) == str(second)
    assert first.base == second.base


def hook_count(model: nn.Module) -> int:
    places = [m._forward_hooks | m._forward_pre_hooks | m._backward_hooks for m in model.modules()]
    on_weights = [p._post_accumulate_grad_hooks or {} for p in model.parameters()]  # type: ignore[attr-defined]
    return sum(map(len, places)) + sum(map(len, on_weights))


def fingerprint(model: nn.Module) -> list[Any]:
    flags = [
        (p.requires_grad, None if p.grad is None else p.grad.clone(), p._version) for p in model.parameters()
    ]
    return [[m.training for m in model.modules()], hook_count(model), flags, torch.get_rng_state().tolist()]


class Boom(Exception):
    """Raised by a model or a loader of batches."""


def test_modes_flags_gradients_and_hooks_are_as_before(net: nn.Module, batches: Batches) -> None:
    net.blocks[0].eval()  # type: ignore[index, union-attr, operator]
    net.head.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    net.head.bias.grad = torch.ones(3, dtype=torch.float64)  # type: ignore[union-attr]
    before = fingerprint(net)
    collect(net, batches, EVERYTHING)
    assert str(fingerprint(net)) == str(before)


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["batches", "forward", "backward", "loss"])
def test_they_are_as_before_after_an_error_too(
    net: nn.Module, batches: Batches, error: type[BaseException], where: str
) -> None:
    def fail(*args: Any) -> None:
        raise error

    def broken() -> Iterator[Any]:
        yield batches[0]
        raise error

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if where == "loss":
            fail()
        found: Tensor = model(**batch)["loss"]
        if where == "backward" and found.requires_grad:
            found.register_hook(fail)
        return found

    before = fingerprint(net)
    given: Any = broken() if where == "batches" else batches
    handle = net.blocks[1].register_forward_pre_hook(fail) if where == "forward" else None  # type: ignore[index, union-attr]
    with pytest.raises(error):
        collect(net, given, EVERYTHING, loss=loss)
    if handle is not None:
        handle.remove()
    assert str(fingerprint(net)) == str(before)


def test_weights_that_share_an_input_share_its_statistics(net: nn.Module, batches: Batches) -> None:
    found = collect(net, batches, ["input_gram", "output_mean"])
    assert {path: entry.leader for path, entry in found.items() if path.startswith("blocks.0")} == {
        "blocks.0.q": "blocks.0.q", "blocks.0.k": "blocks.0.q", "blocks.0.v": "blocks.0.q",
        "blocks.0.up": "blocks.0.up", "blocks.0.down": "blocks.0.down",
    }  # fmt: skip
    q, k, up = (found[f"blocks.0.{name}"] for name in ("q", "k", "up"))
    assert q.get("input_gram").equal(k.get("input_gram"))
    assert k.reducers[0] is q.reducers[0] is not up.reducers[0]
    assert k.reducers[1] is not q.reducers[1]
    assert k.tokens == q.tokens
    alone = collect(net, batches, ["input_gram", "output_mean"], targets="blocks.0.k")
    assert alone["blocks.0.k"].get("input_gram").equal(k.get("input_gram"))
    assert alone["blocks.0.k"].get("output_mean").equal(k.get("output_mean"))


def test_a_shared_input_is_computed_once(net: nn.Module, batches: Batches, monkeypatch: Any) -> None:
    updates: list[int] = []
    plain = REDUCERS["input_mean"].update
    monkeypatch.setattr(
        REDUCERS["input_mean"], "update", lambda self, seen: (updates.append(1), plain(self, seen))
    )
    collect(net, batches, "input_mean", targets=["q", "k", "v"])
    assert len(updates) == 2 * len(batches)


class Changing(nn.Module):
    """Two layers whose inputs are one tensor, equal tensors, or one tensor changed in between."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(3, 3), nn.Linear(3, 3), how

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both."""
        x = x * 1
        first = self.a(x)
        how = self.how if self.how != "later" else ("one" if len(x) == 2 else "copied")
        if how == "copied":
            return first + self.b(x.clone())  # type: ignore[no-any-return]
        if how == "freed":
            x = x * 1 + 0
        if how == "in place":
            x.mul_(2)
        return first + self.b(x[:2] if how == "part" else x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("how", "shared"), [("one", True), ("copied", False), ("freed", False), ("in place", False)]
)
def test_only_the_same_unchanged_tensor_is_one_input(how: str, shared: bool) -> None:
    found = collect(Changing(how), [torch.randn(2, 3), torch.randn(4, 3)], "input_mean")
    assert found["b"].shares_input is shared
    factor = 2 if how == "in place" else 1
    torch.testing.assert_close(found["b"].get("input_mean"), factor * found["a"].get("input_mean"))


def test_inputs_that_are_one_at_first_and_two_later_are_an_error() -> None:
    with pytest.raises(Incompatible, match="batch 1: b and a had one input in the first batch"):
        collect(Changing("later"), [torch.randn(2, 3), torch.randn(4, 3)], "input_mean")
    found = collect(
        Changing("later"), [torch.randn(2, 3), torch.randn(4, 3)], "gradient", loss=lambda m, x: m(x).sum()
    )
    assert found["b"].get("gradient").any()


class Alive(TorchDispatchMode):
    """Counts the storages of one size that are alive at once."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.most = numbers, 0
        self.storages: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it makes."""
        out = op(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() == self.numbers:
            self.storages.add(StorageWeakRef(out.untyped_storage()))
        self.storages = {storage for storage in self.storages if not storage.expired()}
        self.most = max(self.most, len(self.storages))
        return out


def alive(depth: int, what: str) -> int:
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(depth)))
    mode = Alive(32 * 32)
    with mode:
        collect(model, [torch.ones(1, 32)] * 2, what, loss=lambda m, x: m(x).pow(2).sum())
    return mode.most - depth  # the weights


def test_gradients_are_consumed_one_weight_at_a_time() -> None:
    assert alive(12, "sensitivity") == alive(2, "sensitivity")
    assert alive(12, "squared_gradient_rows") == alive(2, "squared_gradient_rows")
    assert alive(12, "gradient") == alive(2, "gradient") + 10  # the sums themselves


def test_a_new_statistic_is_one_class(net: nn.Module, batches: Batches, tmp_path: Path) -> None:
    class Largest(Reducer):
        side = "gradient"

        def layout(self, out: int, columns: int) -> dict[str, tuple[int, ...]]:
            return {"total": ()}

        def update(self, seen: Seen) -> None:
            self.add("total", seen.gradient.abs().max())

        def value(self, batches: int) -> Tensor:
            return self.sums["total"] / batches

    reducer("largest")(Largest)
    try:
        found = collect(net, batches, ["largest", "gradient"])
        found.save(tmp_path / "file")
        same(Statistics.load(tmp_path / "file"), found)
        for entry in found.values():
            assert float(entry.get("largest")) >= float(entry.get("gradient").abs().max())
    finally:
        del REDUCERS["largest"]


# Numbers that are none --------------------------------------------------------------------------------


def poisoned(batches: Batches) -> Batches:
    bad = {**batches[1], "x": batches[1]["x"].clone()}
    bad["x"][1, 1, 0] = float("nan")
    return [batches[0], bad, batches[2]]


@pytest.mark.parametrize("what", ["input_mean", "output_gram", "gradient", "hessian_diagonal"])
def test_a_batch_that_is_not_finite_is_named(net: nn.Module, batches: Batches, what: str) -> None:
    with pytest.raises(NotFinite, match=r"batch 1: .*(blocks\.0|the loss).*; pass nan='skip'"):
        collect(net, poisoned(batches), what)


def test_a_gradient_that_overflows_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).float()
    with pytest.raises(NotFinite, match=r"batch 0: the gradient of 0 holds"):
        collect(model, [torch.ones(1, 2)], "gradient", loss=_overflowing)


def _overflowing(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model(x).sum()
    model[0].weight.register_hook(lambda g: g * float("inf")) if model[0].weight.requires_grad else None  # type: ignore[index, union-attr, operator]
    return out


@pytest.mark.parametrize(("what", "side"), [("input_mean", "input"), ("output_mean", "output")])
def test_activations_are_looked_at_without_a_loss_too(what: str, side: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(NotFinite, match=f"batch 1: the {side} of 0 holds"):
        collect(model, [torch.ones(2, 3), torch.full((2, 3), float("inf"))], what)


def test_numbers_whose_sum_overflows_are_finite() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    nn.init.zeros_(model[0].weight)
    found = collect(model, [torch.ones(1, 4)], "gradient", loss=lambda m, x: 3e38 * m[0].weight.sum())
    assert found["0"].get("gradient").eq(3e38).all()


def test_a_skipped_batch_enters_no_statistic(net: nn.Module, batches: Batches) -> None:
    with_bad = collect(net, poisoned(batches), EVERYTHING[:-1], nan="skip")
    without = collect(net, [batches[0], batches[2]], EVERYTHING[:-1])
    assert (with_bad.skipped, with_bad.batches) == (1, 2)
    one, other = tensors_of(with_bad), tensors_of(without)
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert "(1 skipped)" in str(with_bad)


def test_a_batch_that_turns_bad_in_its_last_layer_is_skipped_whole(net: nn.Module, batches: Batches) -> None:
    bad = {**batches[1], "labels": torch.full_like(batches[1]["labels"], -100)}  # the mean of no token
    found = collect(net, [batches[0], bad, batches[2]], ["input_gram", "gradient"], nan="skip")
    clean = collect(net, [batches[0], batches[2]], ["input_gram", "gradient"])
    one, other = tensors_of(found), tensors_of(clean)
    assert found.skipped == 1
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_values_under_padding_may_be_anything(net: nn.Module, batches: Batches) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2).double()

        def forward(self, x: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(x / attention_mask[..., None])  # type: ignore[no-any-return]

    found = collect(Masked(), batches, "input_mean")
    assert found["layer"].get("input_mean").isfinite().all()


def test_a_pass_of_bad_batches_alone_is_an_error(net: nn.Module, batches: Batches) -> None:
    with pytest.raises(NotFinite, match="all 2 batches were skipped"):
        collect(net, [poisoned(batches)[1]] * 2, "input_mean", nan="skip")


# Resuming ---------------------------------------------------------------------------------------------


def stopping(batches: Batches, after: int, error: type[BaseException] = KeyboardInterrupt) -> Iterator[Any]:
    yield from batches[:after]
    raise error


@pytest.mark.parametrize("after", [1, 2, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Boom])
def test_an_interrupted_pass_continues_bit_for_bit(
    net_of: Any, batches_of: Any, tmp_path: Path, after: int, error: type[BaseException]
) -> None:
    net, batches, file = net_of(torch.float32), batches_of(5, torch.float32), tmp_path / "partial"
    whole = collect(net, batches, EVERYTHING)
    with pytest.raises(error):
        collect(net, stopping(batches, after, error), EVERYTHING, resume=file)
    assert Statistics.load(file).batches == after
    taken: list[int] = []

    def counted() -> Iterator[Any]:
        for index, batch in enumerate(batches):
            taken.append(index)
            yield batch

    same(collect(net, counted(), EVERYTHING, resume=file), whole)
    assert taken == list(range(5))
    same(collect(net, batches, EVERYTHING, resume=file), whole)  # a finished pass is not counted again


def test_skipped_batches_are_not_counted_again(net: nn.Module, batches: Batches, tmp_path: Path) -> None:
    bad, file = poisoned(batches), tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        collect(net, stopping(bad, 2), "gradient", resume=file, nan="skip")
    same(collect(net, bad, "gradient", resume=file, nan="skip"), collect(net, bad, "gradient", nan="skip"))


def test_a_loader_without_a_length_is_run_through(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            yield from torch.ones(5, 3)

    model = nn.Sequential(nn.Linear(3, 2))
    found = collect(model, torch.utils.data.DataLoader(Stream(), batch_size=2), "input_mean")
    assert (found.batches, found["0"].tokens) == (3, 5)


def test_an_interrupt_within_a_batch_waits_for_its_end(
    net: nn.Module, batches: Batches, tmp_path: Path
) -> None:
    file, calls = tmp_path / "partial", [0]

    def interrupted(model: nn.Module, batch: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:  # the first batch runs twice
            signal.raise_signal(signal.SIGINT)
        return model(**batch)["loss"]  # type: ignore[no-any-return]

    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            collect(net, batches, EVERYTHING, resume=file, loss=interrupted)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, usual)
    assert Statistics.load(file).batches == 2
    same(
        collect(net, batches, EVERYTHING, resume=file, loss=lambda m, b: m(**b)["loss"]),
        collect(net, batches, EVERYTHING),
    )


def test_half_a_batch_is_never_written(net: nn.Module, batches: Batches, tmp_path: Path) -> None:
    file, calls = tmp_path / "partial", [0]

    def broken(model: nn.Module, batch: Any) -> Tensor:
        calls[0] += 1
        found: Tensor = model(**batch)["loss"]
        if calls[0] == 4:
            raise Boom
        return found

    with pytest.raises(Boom):
        collect(net, batches, EVERYTHING, resume=file, loss=broken, every=2)
    assert Statistics.load(file).batches == 2
    calls[0] = 3
    with pytest.raises(Boom):
        collect(net, batches, EVERYTHING, resume=tmp_path / "none", loss=broken, every=1)
    assert not (tmp_path / "none").exists()


def test_a_pass_in_another_thread_resumes_too(net: nn.Module, batches: Batches, tmp_path: Path) -> None:
    found: list[Statistics] = []
    thread = threading.Thread(
        target=lambda: found.append(collect(net, batches, "input_mean", resume=tmp_path / "partial"))
    )
    thread.start()
    thread.join()
    same(found[0], collect(net, batches, "input_mean"))


def test_another_pass_is_not_continued(net: nn.Module, batches: Batches, tmp_path: Path) -> None:
    file = tmp_path / "partial"
    collect(net, batches, "input_mean", resume=file)
    for options in ({"what": "input_gram"}, {"targets": "q"}, {"seed": 1}, {"mask": None}):
        given: dict[str, Any] = {"what": "input_mean", **options}
        with pytest.raises(Incompatible):
            collect(net, batches, given.pop("what"), resume=file, **given)
    with pytest.raises(Incompatible, match=r"holds 3 batches and the iterable gives 2"):
        collect(net, batches[:2], "input_mean", resume=file)
    with torch.no_grad():
        net.blocks[0].q.weight[0, 0] += 1e-2  # type: ignore[index, union-attr, operator]
    with pytest.raises(BaseMismatch, match="another model"):
        collect(net, batches, "input_mean", resume=file)
    file.write_bytes(b"something else")
    with pytest.raises(FormatError):
        collect(net, batches, "input_mean", resume=file)
    assert file.read_bytes() == b"something else"
    with pytest.raises(MissingPath, match="no folder"):
        collect(net, batches, "input_mean", resume=tmp_path / "not" / "there")
    with pytest.raises(FileExistsError):
        collect(net, batches, "input_mean", resume=tmp_path)


# Sequential mode --------------------------------------------------------------------------------------


def test_groups_come_in_the_order_of_their_first_call(net: nn.Module, batches: Batches) -> None:
    order = [paths for paths, _ in sequentially(net, batches, "input_gram", targets=["blocks.*", "head"])]
    block = [["q", "k", "v"], ["up"], ["down"]]
    expected = [[f"blocks.{i}.{name}" for name in group] for i in range(2) for group in block]
    assert order == [*expected, ["head"]]


@pytest.mark.parametrize("what", ["input_gram", "gradient", "output_mean"])
def test_later_groups_see_the_changed_layers_and_earlier_ones_the_old(
    net_of: Any, batches: Batches, what: str
) -> None:
    changed, reference = net_of(), net_of()
    for paths, found in sequentially(changed, batches, what):
        expected = collect(reference, batches, what, targets=paths)
        assert list(found) == paths
        for path in paths:
            torch.testing.assert_close(found[path].get(what), expected[path].get(what))
            for model in (changed, reference):
                with torch.no_grad():
                    model.get_submodule(path).weight.mul_(1.5)


def test_without_changes_sequential_equals_parallel(net: nn.Module, batches: Batches) -> None:
    parallel = collect(net, batches, EVERYTHING)
    for paths, found in sequentially(net, batches, EVERYTHING):
        for path in paths:
            for asked in EVERYTHING:
                name, options = asked if isinstance(asked, tuple) else (asked, {})
                if name == "input_gram" and not options:
                    options = {"per_sample": "none"}
                if name not in ("input_pca", "hessian_diagonal"):
                    torch.testing.assert_close(
                        found[path].get(name, **options), parallel[path].get(name, **options)
                    )


def test_a_forward_ends_when_the_group_was_called(net: nn.Module, batches: Batches) -> None:
    calls = [0]
    net.head.register_forward_hook(lambda *args: calls.__setitem__(0, calls[0] + 1))  # type: ignore[union-attr, operator]
    passes = sequentially(net, batches, "input_gram", targets="blocks.0.*")
    next(passes)
    first = calls[0]
    assert first <= 1  # the forward that finds the groups
    assert len(list(passes)) == 2
    assert calls[0] == first
    list(sequentially(net, batches, "gradient", targets="blocks.0.*"))
    assert calls[0] >= first + 3 * len(batches)


def test_layers_may_be_replaced_between_groups(net: nn.Module, batches: Batches) -> None:
    import rankfold as rf

    seen = []
    for paths, found in sequentially(net, batches, "input_gram"):
        seen += [path for path in paths if found[path].tokens]
        rf.adapt(net, "lora", rank=2, targets=paths, name=paths[0].replace(".", "_"))
    assert len(seen) == 11


def test_batches_for_many_passes_cannot_be_an_iterator(net: nn.Module, batches: Batches) -> None:
    with pytest.raises(InvalidOption, match="pass a list"):
        next(sequentially(net, iter(batches), "input_gram"))
    with pytest.raises(InvalidOption, match="no batches"):
        next(sequentially(net, [], "input_gram"))


def test_a_layer_that_no_batch_reaches_says_so(net: nn.Module, batches: Batches) -> None:
    net.spare = nn.Linear(6, 6).double()
    found = collect(net, batches, ["input_mean", "gradient"])
    for name in ("input_mean", "gradient"):
        with pytest.raises(NotCollected, match=r"spare: no (token|gradient) of any batch reached it"):
            found["spare"].get(name)
    with pytest.raises(UnsupportedLayer, match="no batch reached any"):
        collect(net, batches, "input_mean", targets="spare")
