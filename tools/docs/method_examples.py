"""A short example of every method, written from what it registers and run to see what it prints.

An example is a doctest of one import and three statements: adapt a small model, and print what trains or
take a step with what rides on the optimizer. Options without which a method cannot be used come from the
`example` of its registration, data are a made-up batch. A method of which something else has to be shown has
an example in the docstring of its function, which is taken instead.
"""

from __future__ import annotations

import doctest
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rankfold as rf
from rankfold.methods import space
from rankfold.methods.recipe import Resolved, resolve, split_part
from rankfold.methods.registry import axes_of, needs_of

RANK = 2
LAYERS = {
    "linear": "torch.nn.Linear(16, 16)",
    "convolution": "torch.nn.Conv2d(16, 16, 3)",
    "embedding": "torch.nn.Embedding(16, 16)",
    "attention": "torch.nn.MultiheadAttention(16, 2)",
}
INPUTS = {
    "linear": "torch.eye(16)",
    "convolution": "torch.ones(1, 16, 3, 3)",
    "embedding": "torch.arange(4)",
}
CONFIG = (
    "config = transformers.LlamaConfig(\n"
    "    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2\n"
    ")"
)


@dataclass(frozen=True)
class Host:
    """A small model that an example adapts, as code.

    Attributes:
        imports: the import.
        before: statements that come before.
        model: the model.
        batches: data for calibration.
        loss: of a batch.
        step: what has a gradient.
        is_chain: a chain of layers, whose first one is adapted where a preset does not mean it.
    """

    imports: str
    before: tuple[str, ...]
    model: str
    batches: str
    loss: str
    step: str
    is_chain: bool


def hosts(resolved: Resolved) -> Iterator[Host]:
    """Yield the models to try: a chain of layers, then a transformer, for methods that need to know more."""
    kind = next(kind for kind in LAYERS if kind in resolved.structure.traits["layers"])
    given = INPUTS.get(kind, INPUTS["linear"])
    layers = ", ".join([LAYERS[kind]] * (2 if resolved.ranks else 1))
    yield Host(
        imports="import torch, rankfold as rf",
        before=(),
        model=f"torch.nn.Sequential({layers})",
        batches=f"[({given},)]",
        loss="lambda model, batch: model(*batch).square().mean()",
        step=f"model({given}).sum()",
        is_chain=True,
    )
    yield Host(
        imports="import torch, transformers, rankfold as rf",
        before=(CONFIG,),
        model="transformers.LlamaForCausalLM(config)",
        batches='[{"input_ids": torch.arange(8)[None]}]',
        loss="lambda model, batch: model(**batch).logits.square().mean()",
        step="model(torch.arange(8)[None]).logits.sum()",
        is_chain=False,
    )


class NoExample(RuntimeError):
    """The example of a method cannot be written, or does not run."""


def accepted_point(method: rf.Method) -> rf.Recipe:
    """Return a point with the method that is not refused: alone, or with one other method beside it.

    Raises:
        NoExample: every such point is refused.
    """
    if method.axis == "recipe":
        return method.build()  # type: ignore[no-any-return]
    others = [m for axis in ("ranks", "dynamics", "init", "structure") for m in rf.methods(axis)]
    mine = space.axis_of(method)
    for parts in ([method], *([method, other] for other in others if other.axis != mine)):
        recipe = space.point(parts)
        if not space.refusal(recipe):
            return recipe
    raise NoExample(space.refusal(space.point([method])))


def example(method: rf.Method) -> str:
    """Return the example of a method, with what it prints.

    Raises:
        NoExample: it does not run; the sentence names the method and what would help.
    """
    if method.build not in _EXAMPLES:
        _EXAMPLES[method.build] = _example(method)
    return _EXAMPLES[method.build]


_EXAMPLES: dict[object, str] = {}


def _example(method: rf.Method) -> str:
    reasons = []
    try:
        for code in _candidates(method):
            try:
                return _seeded(code)
            except NoExample as reason:
                reasons.append(reason)
    except Exception as reason:  # a method may raise anything
        reasons.append(NoExample(reason))
    raise NoExample(
        f"no example can be made of the {method.axis} {method.name!r}: {'; '.join(map(str, reasons))}. What "
        "it cannot be used without belongs into `example=` of its registration"
    )


def _seeded(code: str) -> str:
    """Return statements with what they print, with a seed where that depends on the numbers of the model."""
    text = printed(code)
    if text == printed(code, seed=1):
        return text
    first, rest = code.split("\n", 1)
    return printed(f"{first}\n>>> _ = torch.manual_seed(0)\n{rest}")


def is_function(method: rf.Method) -> bool:
    """Say whether a method is a function to call, and no part of a point."""
    return bool(method.traits.get("function")) or space.axis_of(method) not in (*space.AXES, "recipe")


def _candidates(method: rf.Method) -> Iterator[str]:
    """Yield the examples to try."""
    if method.axis == "merge":
        yield from _of_rule(method)
        return
    if is_function(method):
        yield _of_function(method)
        return
    own = _own(method)
    if own:
        yield "\n".join(map(_prompted, own))
    resolved = resolve(accepted_point(method), {})
    for host in hosts(resolved):
        yield "\n".join(map(_prompted, _statements(method, resolved, host)))


def _of_function(method: rf.Method) -> str:
    """Return the example of the function that stands for a method, with its import."""
    own = f"{method.build.__module__}.{method.build.__qualname__}"
    module, _, name = (method.traits.get("function") or own).rpartition(".")
    found = _own(method)
    if not found:
        raise NoExample("its function has no example in its docstring")
    imports = f"from {module} import {name}\n"
    needed = any(re.search(rf"(?<![.\w]){name}\(", source) for source in found)
    return "\n".join(map(_prompted, [imports, *found] if needed else found))


def _of_rule(method: rf.Method) -> Iterator[str]:
    """Yield examples of merging by a rule, without data and with them."""
    layers = "torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))"
    options = {"progress": False, **method.traits.get("example", {})}
    given = "".join(f", {key}={_code(value)}" for key, value in options.items())
    base = "" if method.traits["base"] == "unused" else ", base=base"
    imports = "import torch, rankfold as rf"
    before = [f"base = {layers}"] if base else []
    for data in ("", ", data=[torch.eye(8)]"):
        lines = [
            imports,
            *before,
            f"models = [{layers} for _ in range(2)]",
            f'merged = rf.merge(models, "{method.name}"{base}{data}{given})',
            "merged(torch.ones(1, 8)).shape",
        ]
        yield "\n".join(map(_prompted, lines))


def _own(method: rf.Method) -> list[str]:
    """Return the statements of the example in a function's docstring."""
    parsed = doctest.DocTestParser().get_examples(inspect.getdoc(method.build) or "")
    return [example.source for example in parsed]


def _prompted(source: str) -> str:
    first, *rest = source.rstrip("\n").split("\n")
    return "\n".join([f">>> {first}", *(f"... {line}" for line in rest)])


def _statements(method: rf.Method, resolved: Resolved, host: Host) -> list[str]:
    needs = _needs(resolved)
    lines = [host.imports, *host.before]
    if needs or asked_of_attach(resolved) & {"validation", "loss"}:
        lines.append(f"batches, loss = {host.batches}, {host.loss}")
    lines.append(f"model = rf.adapt({host.model}, {_arguments(method, resolved, needs, host)})")
    return lines + (_attached(resolved, host) if resolved.riding else ["print(rf.summary(model))"])


def _needs(resolved: Resolved) -> list[str]:
    parts = (
        (resolved.structure, resolved.options),
        (resolved.init, resolved.init_options),
        (resolved.ranks, resolved.ranks_options),
    )
    found = [need for method, options in parts for need in needs_of(method, options, RANK)]
    return [need if isinstance(need, str) else need[0] for need in found]


def _arguments(method: rf.Method, resolved: Resolved, needs: Sequence[str], host: Host) -> str:
    traits = resolved.structure.traits
    is_named = method.axis == "recipe"
    text, options = (_code(method.name), {}) if is_named else _point(accepted_point(method))
    found = [text]
    if traits["rank"] is not None:
        multiple = traits["multiple"](resolved.options)
        found.append(f"rank={multiple * max(1, RANK // multiple)}")
    if host.is_chain and (traits["targets"] != "all-linear" or "linear" not in traits["layers"]):
        found.append('targets=["0"]')
    if needs:
        found += [f"data={_data(needs)}", "loss=loss"]
    if resolved.init is not None and resolved.init.traits["rate"]:
        found.append("lr=1e-3")
    return ", ".join(found + [f"{key}={_code(value)}" for key, value in options.items()])


def _data(needs: Sequence[str]) -> str:
    sets = sorted({name.partition("@")[2] for name in needs})
    return "batches" if sets == [""] else "{" + ", ".join(f'"{name}": batches' for name in sets) + "}"


def _point(recipe: rf.Recipe) -> tuple[str, dict[str, Any]]:
    """Return the point as code, and the structure's options, which are keyword arguments."""
    name, options = split_part(recipe.structure)
    axes = {"structure": name, "init": recipe.init, "ranks": recipe.ranks}
    chosen = {axis: split_part(part) for axis, part in axes.items() if part is not None}
    dynamics = [split_part(part) for part in recipe.dynamics]
    if not any(given for _, given in [*chosen.values(), *dynamics]):
        words = [_word(axis, part[0]) for axis, part in chosen.items()]
        return _code("/".join(words + [_word("dynamics", name) for name, _ in dynamics])), options
    parts = [f"{axis}={_part(part)}" for axis, part in chosen.items()]
    parts += [f"dynamics=[{', '.join(map(_part, dynamics))}]"] if dynamics else []
    return f"rf.Recipe({', '.join(parts)})", options


def _word(axis: str, name: str) -> str:
    points = [known for known in axes_of(name) if known in (*space.AXES, "pretrain", "recipe")]
    return name if len(points) == 1 else f"{axis}={name}"


def _part(part: tuple[str, Mapping[str, Any]]) -> str:
    return _code((part[0], dict(part[1])) if part[1] else part[0])


def _code(value: Any) -> str:
    """Return a value as Python code, texts in the quotes that the code of this package uses."""
    if isinstance(value, str):
        return f'"{value}"' if '"' not in value else repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_code(k)}: {_code(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_code, value))}{',' if len(value) == 1 else ''})"
    return f"[{', '.join(map(_code, value))}]" if isinstance(value, list) else repr(value)


def asked_of_attach(resolved: Resolved) -> set[str]:
    """Return what `attach` has to be given: total_steps, scheduler, validation, loss."""
    methods = [rf.find_method(f"dynamics={name}") for name in resolved.dynamics]
    wanted = {need for method in methods for need in method.traits["needs"]}
    return wanted | {need for rule in resolved.riding.values() for need in getattr(rule, "needs", ())}


def _attached(resolved: Resolved, host: Host) -> list[str]:
    given = {"validation": "batches", "loss": "loss"}
    wants = "".join(f", {name}={code}" for name, code in given.items() if name in asked_of_attach(resolved))
    lines = ["optimizer = torch.optim.AdamW(rf.param_groups(model, lr=1e-3))"]
    attach = f"rf.attach(model, optimizer, total_steps=100{wants})"
    if resolved.structure.traits["gate"] or resolved.structure.traits["activations"]:
        return [*lines, f"handle = {attach}"]
    return [*lines, f"with {attach}:\n    {host.step}.backward()\n    optimizer.step()"]


class _Recorder(doctest.DocTestRunner):
    """Keeps what every statement prints."""

    def __init__(self) -> None:
        super().__init__(verbose=False)
        self.printed: list[str] = []

    def report_success(self, out: Any, test: Any, example: Any, got: str) -> None:
        self.printed.append(got)

    report_failure = report_success  # what is printed is not known beforehand

    def report_unexpected_exception(self, out: Any, test: Any, example: Any, exc_info: Any) -> None:
        raise NoExample(f"`{example.source.strip()}` raises {exc_info[0].__name__}: {exc_info[1]}")


def printed(code: str, seed: int = 0) -> str:
    """Return statements with what they print under each.

    Raises:
        NoExample: a statement raises.
    """
    examples, recorder, _ = _ran(code, seed)
    shown = zip(examples, recorder.printed, strict=True)
    return "\n".join(f"{_prompted(e.source)}\n{got}".rstrip("\n") for e, got in shown)


def adapted(method: rf.Method) -> Any:
    """Return the model that the example of a method leaves."""
    return _ran(example(method), 0)[2]["model"]


def _ran(code: str, seed: int) -> tuple[list[doctest.Example], _Recorder, dict[str, Any]]:
    """Run statements; return them, what they print, and the names that they leave."""
    import torch

    test = doctest.DocTestParser().get_doctest(code, {}, "example", None, None)
    recorder = _Recorder()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore")  # a rank that such a small model cannot hold is capped
        recorder.run(test, clear_globs=False)
    return test.examples, recorder, test.globs
