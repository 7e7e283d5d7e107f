"""Which modules of a model are meant: by preset, by glob, by regular expression or by name."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import UnknownTarget, UnsupportedLayer, near_names
from .feedforward import gated_block
from .layer import StructuredAttention, StructuredLayer, kind_of, why_refused

PRESETS = {
    "all-linear": "every linear layer but the output head",
    "attention": "the linear layers of attention",
    "mlp": "the linear layers of the feed-forward blocks",
    "vision": "the linear layers of a vision encoder and of what joins it to a language model",
    "cross-attention": "the linear layers of attention from one sequence, or modality, to another",
    "language": "all other linear layers but the output head",
    "embeddings": "every embedding",
    "convolutions": "every convolution",
    "blocks": "the outputs of the repeated blocks (for methods that act on activations)",
    "gated-mlp": "the outputs of the gated feed-forward blocks (for methods that act on activations)",
}
_ATTENTION = re.compile(r"attn|attention|self_attn|selfattention|encdecattention|\battn", re.IGNORECASE)
_VISION = re.compile(r"vision|visual|image|multi_?modal|\b(projector|connector|merger)\b", re.IGNORECASE)
_CROSS = re.compile(r"cross_?att|encdecatt|encoder_attn", re.IGNORECASE)
_HEADS = ("lm_head", "classifier", "score", "qa_outputs", "embed_out", "cls", "output_projection")
_TASK = re.compile(r"For(\w*Classification|QuestionAnswering|MultipleChoice)$")
Targets = str | re.Pattern[str] | Sequence[str | re.Pattern[str]]


@dataclass(frozen=True)
class Target:
    """A module that can be adapted.

    Attributes:
        path: its dotted name; projections of `nn.MultiheadAttention` are `<path>.in_proj` and `.out_proj`.
        module: the module itself; for those projections, the attention module.
        part: "in_proj" or "out_proj" for those projections, else "".
    """

    path: str
    module: nn.Module = field(compare=False)
    part: str = ""


def candidates(model: nn.Module) -> Iterator[Target]:
    """Yield every module that can hold an expression, in the order of the model, tied modules included.

    A place inside a block that stands in the model twice has two paths and is named by the first.
    """
    skipped: set[str] = set()
    places: set[tuple[int, str]] = set()
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        if path in skipped or not path or any(path.startswith(s + ".") for s in skipped):
            continue
        parent, _, name = path.rpartition(".")
        if (id(modules[parent]), name) in places:
            continue
        places.add((id(modules[parent]), name))
        original = module.original if isinstance(module, StructuredLayer) else module
        if isinstance(original, nn.MultiheadAttention):
            skipped.update({f"{path}.out_proj", f"{path}.in_proj"})
            if original.in_proj_weight is not None:
                yield Target(f"{path}.in_proj", module, "in_proj")
            yield Target(f"{path}.out_proj", module, "out_proj")
        elif isinstance(module, StructuredLayer):
            skipped.add(f"{path}.adapters")
            yield Target(path, module)
        elif kind_of(module) is not None:
            yield Target(path, module)


def blocks(model: nn.Module) -> Iterator[Target]:
    """Yield the members of every `nn.ModuleList` that repeats one class: the model's blocks."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and _repeats(module) and not _in_block(path):
            yield from (Target(f"{path}.{i}", block) for i, block in enumerate(module))


def _repeats(module: nn.ModuleList) -> bool:
    one_class = len({type(m) for m in module}) == 1
    return one_class and len(module) > 1 and not isinstance(module[0], nn.ModuleList)


def _in_block(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def output_heads(model: nn.Module) -> set[str]:
    """Return the names of the output head and of task heads, which no preset includes.

    They are the parts of a transformers model outside its base model, its output embeddings, and, in any
    model, children with a head's usual name.
    """
    heads = set(_own_heads(model))
    for path, module in model.named_modules():
        if path and hasattr(module, "get_output_embeddings"):
            heads |= {f"{path}.{name}" for name in _own_heads(module)}
    return heads


def _own_heads(model: nn.Module) -> list[str]:
    """Return the names of a model's heads."""
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    modules = model.named_modules(remove_duplicate=False)
    named = [name for name, module in modules if output is not None and module is output]
    base = getattr(model, "base_model", model)
    for name, child in model.named_children():
        outside = base is not model and child is not base and next(child.parameters(), None) is not None
        if name not in named and (outside or name in _HEADS):
            named.append(name)
    return named


def _is_linear(target: Target) -> bool:
    return not isinstance(_plain(target), nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _preset(model: nn.Module, name: str, found: list[Target]) -> list[Target]:
    if name == "blocks":
        return list(blocks(model))
    if name == "gated-mlp":
        return [Target(p, m) for p, m in model.named_modules() if p and gated_block(m) is not None]
    if name == "embeddings":
        return [t for t in found if isinstance(_plain(t), nn.Embedding)]
    if name == "convolutions":
        return [t for t in found if isinstance(_plain(t), nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    heads = output_heads(model)
    inner = [t for t in found if not any(t.path == h or t.path.startswith(h + ".") for h in heads)]
    linear = [t for t in inner if _is_linear(t)]
    if name == "attention":
        return [t for t in linear if _in_attention(t)]
    if name == "mlp":
        return [t for t in linear if _in_block(t.path) and not _in_attention(t)]
    if name in ("vision", "cross-attention", "language"):
        return [t for t in linear if _modality(t.path) == name]
    return linear


def _modality(path: str) -> str:
    return "vision" if _VISION.search(path) else "cross-attention" if _CROSS.search(path) else "language"


def _plain(target: Target) -> nn.Module:
    return target.module.original if isinstance(target.module, StructuredLayer) else target.module


def _in_attention(target: Target) -> bool:
    return bool(_ATTENTION.search(target.path)) or isinstance(_plain(target), nn.MultiheadAttention)


def matches(path: str, pattern: str | re.Pattern[str]) -> bool:
    r"""Say whether a pattern means a path.

    A compiled or `re:` regular expression must match all of it, anything else is a glob for the whole path or
    for its last parts.

    Example:
        >>> matches("model.layers.0.self_attn.q_proj", "q_proj")
        True
        >>> matches("model.layers.0.self_attn.q_proj", "layers.[01].*.?_proj")
        True
        >>> matches("model.layers.0.self_attn.q_proj", r"re:.*layers\.\d+\.mlp\..*")
        False
    """
    if isinstance(pattern, str) and pattern.startswith("re:"):
        pattern = _compiled(pattern[3:])
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(path) is not None
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UnknownTarget(f"target 're:{text}' is no regular expression: {error}") from None


def find_targets(model: nn.Module, targets: Targets) -> list[Target]:
    """Return the targeted modules in the order of the model.

    Args:
        model: any module.
        targets: a preset of `PRESETS`, a glob over dotted names (or over their last parts), a regular
            expression (compiled, or text that starts with `re:`), or a list of these.

    Raises:
        UnknownTarget: a pattern matches nothing; the sentence lists near names.
        UnsupportedLayer: a pattern matches only modules that cannot hold an expression.
    """
    if not isinstance(targets, str | re.Pattern | Iterable):
        raise UnknownTarget(f"targets are names, patterns or a preset, not {targets!r}")
    patterns: list[Any] = [targets] if isinstance(targets, str | re.Pattern) else list(targets)
    if not patterns:
        raise UnknownTarget("no targets were given; name some, or use 'all-linear'")
    odd = next((p for p in patterns if not isinstance(p, str | re.Pattern)), None)
    if odd is not None:
        kind = "modules" if isinstance(odd, nn.Module) else type(odd).__name__
        raise UnknownTarget(f"targets are names, not {kind}")
    found, wanted = list(candidates(model)), {}
    for pattern in patterns:
        for target in _matched(model, pattern, found):
            wanted[target.path] = target
    order = {path: i for i, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return sorted(
        wanted.values(), key=lambda t: (order.get(t.path, order.get(t.path.rpartition(".")[0], 0)), t.path)
    )


def _matched(model: nn.Module, pattern: str | re.Pattern[str], found: list[Target]) -> list[Target]:
    if isinstance(pattern, str) and pattern in PRESETS:
        hits = _preset(model, pattern, found)
    else:
        hits = [t for t in found if matches(t.path, pattern)]
    return hits or _nothing(model, pattern, found)


def _nothing(model: nn.Module, pattern: str | re.Pattern[str], found: list[Target]) -> list[Target]:
    text = pattern if isinstance(pattern, str) else pattern.pattern
    refused = [(p, m) for p, m in own_modules(model).items() if matches(p, pattern)]
    refused.sort(key=lambda named: any(named[1].children()))
    if refused and text not in PRESETS:
        path, module = refused[0]
        kind = type(module).__name__
        inside = [t.path for t in found if t.path.startswith(f"{path}.")]
        raise UnsupportedLayer(
            f"target {text!r} matches {path}, but {kind} {why_refused(module)}{_instead(inside)}"
        )
    names = {t.path.rpartition(".")[2] for t in found} | {t.path for t in found} | set(PRESETS)
    listed = sorted({t.path.rpartition(".")[2] for t in found if not t.path.rpartition(".")[2].isdigit()})
    hint = (
        near_names(text, names - {text})
        or f"; the model has {', '.join(listed[:12]) or 'no layer that can be adapted'}"
    )
    if kind_of(model) is not None:
        hint = ", which is itself a layer; wrap it, for example in nn.Sequential"
    raise UnknownTarget(f"target {text!r} matches nothing in {type(model).__name__}{hint}")


def _instead(paths: Sequence[str]) -> str:
    """Return the end of a sentence that names what can be adapted inside of what cannot."""
    more = ", ..." if len(paths) > 4 else ""
    return f"; name what is inside it: {', '.join(paths[:4])}{more}" if paths else ""


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules inside a model by path, without those that adapters brought."""
    adapters = [f"{p}.adapters" for p, m in model.named_modules() if isinstance(m, StructuredLayer)]
    named = {p: m for p, m in model.named_modules() if p and ".rankfold_" not in p}
    return {p: m for p, m in named.items() if not p.startswith(tuple(adapters))}


def find_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the dotted names of modules that are to be trained whole.

    Raises:
        UnknownTarget: a name is that of no module.
    """
    modules = own_modules(model)
    result: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        hits = [path for path in modules if matches(path, name)]
        if not hits:
            raise UnknownTarget(
                f"train={name!r} is no module of {type(model).__name__}{near_names(name, modules)}"
            )
        result += [hit for hit in hits if hit not in result]
    return result


def task_heads(model: nn.Module) -> list[str]:
    """Return the freshly initialised heads of a transformers task model, such as `score` or `classifier`."""
    if not _TASK.search(type(model).__name__):
        return []
    heads = _own_heads(model)
    trained = {name.partition(".")[0] for name, _ in model.named_parameters()}
    return [name for name, _ in model.named_children() if name in heads and name in trained]


def attention_projection(target: Target) -> bool:
    """Say whether a target is a projection inside `nn.MultiheadAttention`."""
    return bool(target.part) or isinstance(target.module, StructuredAttention)
