"""A page for every method, and a table of all of them, from what the methods say of themselves."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial

import griffe
from method_costs import SIDE, TOKENS, Cost, costs, of_lora, state_of, why_not_folded
from method_examples import accepted_point, asked_of_attach, example, is_function

import rankfold as rf
from rankfold.layers.targets import PRESETS
from rankfold.methods import gating, space
from rankfold.methods.recipe import resolve

AXES = {
    "structure": ("Structures", "What shape the change of a weight has."),
    "init": ("Initialisers", "Where its factors start."),
    "ranks": ("Ranks", "How much rank each weight gets."),
    "dynamics": ("Dynamics", "How the parameters move, step by step."),
    "pretrain": (
        "From scratch",
        "What takes the place of a weight, or how a model is begun, when it is trained from scratch.",
    ),
    "optim": ("Optimizers", "How all weights are trained while the optimizer remembers little of each."),
    "recipe": ("Recipes", "Points that a paper has given a name."),
    "compress": ("Compression", "How a model that is there becomes a smaller one."),
    "merge": ("Merging", "How several models, or several adapters, become one."),
    "analysis": ("Analysis", "What a model or two say of themselves."),
}
JOBS = ("compress", "merge", "analysis")  # axes that begin no training
# What the start of an initialiser does to the model.
GIVES = {
    "zero": "a product that is zero, so the model starts as the base",
    "residual": "factors whose product is subtracted from the base, so the model starts as the base",
    "displaced": "factors that move the base",
    "frame": "two outer factors of the weight, which the structure freezes",
    "displaced frame": "two outer factors of the weight and a core that moves the base",
    "gated": "a product behind a gate that is zero, which a rank rule opens",
}
HEAD = """# The methods

Every method is one file, and this part of the documentation is written from those files. A point of the space
is `structure/initialiser/ranks/dynamics`, such as `dora/pissa/adalora/lora+`; every part but the structure
may be left out. [What goes with what](../composition.md) says which points make sense. `rankfold methods`
prints the table below.
"""
EXPERIMENTAL = """
!!! warning "Experimental"

    The paper or its code leave something open; the definition says what.
"""
# How a change with a gate differs over its input; one without an entry does from token to token.
GATES: Mapping[Callable[..., object], str] = {
    gating.class_gate: "Differs from class to class: the class of every row is an input of the model.",
    gating.classifier_gate: "Differs from token to token, as one classifier of the whole model says.",
    gating.invocation_gate: "Acts on some tokens only, which it finds in the inputs of the model.",
    gating.positions_gate: "Acts on some tokens only, which it finds in the inputs of the model.",
    gating.prompt_gate: "Differs from prompt to prompt, or from token to token, as a router says.",
    gating.region_gate: "Acts on the points of a region only: pass it by `rf.gate_inputs`.",
}
LAYER_WORDS = {
    "linear": "linear layers",
    "attention": "the projections of `nn.MultiheadAttention`",
    "embedding": "embeddings",
    "convolution": "convolutions",
}


@dataclass(frozen=True)
class Docstring:
    """A method's documentation in its parts.

    Attributes:
        lead: the first sentence, without the method's name.
        use: the paragraph that begins with "Use it", or "".
        body: the other paragraphs.
    """

    lead: str
    use: str
    body: tuple[str, ...]

    @classmethod
    def of(cls, method: rf.Method) -> Docstring:
        """Return the parts of the docstring of the module that states the method."""
        return cls.parse(method.doc)

    @classmethod
    def parse(cls, text: str) -> Docstring:
        """Return the parts of a docstring."""
        first, *rest = re.split(r"\n[ ]*\n", text.strip("\n"))
        use = [paragraph for paragraph in rest if paragraph.startswith("Use it")]
        body = tuple(paragraph for paragraph in rest if paragraph not in use)
        return cls(" ".join(first.split()), " ".join(" ".join(use).split()), body)


def slug(method: rf.Method) -> str:
    """Return the name of a method's page."""
    return method.name.replace("+", "-plus")


def address(method: rf.Method) -> str:
    """Return the path of a method's page under docs/."""
    return f"methods/{method.axis}/{slug(method)}.md"


def pages() -> dict[str, str]:
    """Return every generated page by its path under docs/.

    Raises:
        NoExample: a method has no example that runs; the sentence names it.
    """
    found = {"methods/index.md": index()}
    return found | {address(method): page(method) for method in rf.methods()}


def navigation() -> list[dict[str, object]]:
    """Return the pages as a section of the site's navigation."""
    sections: list[dict[str, object]] = [{"All methods": "methods/index.md"}]
    for axis in axes():
        entries = [{method.name: address(method)} for method in rf.methods(axis)]
        sections.append({AXES.get(axis, (axis.capitalize(), ""))[0]: entries})
    return sections


def axes() -> list[str]:
    """Return the axes that have methods, in their order."""
    return list(dict.fromkeys(method.axis for method in rf.methods()))


def index() -> str:
    """Return the table of all methods."""
    parts = [HEAD]
    for axis in axes():
        title, sentence = AXES.get(axis, (axis.capitalize(), ""))
        rows = [(f"[{m.name}]({axis}/{slug(m)}.md)", _papers(m), f"`{m.formula}`") for m in rf.methods(axis)]
        parts.append(f"## {title}\n\n{sentence}\n\n{table(('name', 'paper', 'formula'), rows)}")
    return "\n".join(parts)


def page(method: rf.Method) -> str:
    """Return the page of one method."""
    doc, shown = Docstring.of(method), example(method)
    found = {} if is_function(method) else costs(method)
    parts = [
        f"# {method.name}\n\n{escaped(doc.lead)}\n{EXPERIMENTAL if method.status == 'experimental' else ''}",
        f"```text\n{method.formula}\n```\n",
        f"{method.axis} · {method.year} · {method.status} · {_links(method)}\n",
        "## Definition\n",
        *(f"{_paragraph(text)}\n" for text in doc.body),
        f"## Example\n\n```pycon\n{shown}\n```\n",
        f"## When to use it\n\n{when(method, doc, found)}\n",
        *_before_training(method),
        f"## Options\n\n{options(method)}\n",
        f"## Cost\n\n{cost(method, found)}\n",
        f"## Goes with\n\n{partners(method)}\n",
        f"## Citation\n\n```bibtex\n{citation(method)}\n```\n",
    ]
    return "\n".join(parts)


def _before_training(method: rf.Method) -> list[str]:
    """Return what is said of the model before it is trained, of methods that begin a training."""
    if method.axis in JOBS:
        return []
    return [f"## Before the first step\n\nThe model's output is {escaped(str(method.start))}.\n"]


# Parts of a page --------------------------------------------------------------------------------------


def when(method: rf.Method, doc: Docstring, found: Mapping[str, Cost]) -> str:
    """Return what speaks for a method and what it asks for, from its docstring and its registration."""
    asked: dict[str, Callable[[rf.Method], Iterable[str]]] = {
        "structure": partial(_of_structure, found=found),
        "init": _of_init,
        "ranks": _of_ranks,
        "dynamics": _of_dynamics,
        "optim": _of_optim,
        "recipe": _of_recipe,
        "compress": _of_compressor,
        "merge": _of_rule,
    }
    axis = space.axis_of(method)
    facts = "\n".join(f"- {fact}" for fact in (asked[axis](method) if axis in asked else ()))
    return "\n\n".join(text for text in (escaped(doc.use), facts) if text)


def _of_structure(method: rf.Method, found: Mapping[str, Cost]) -> Iterator[str]:
    traits = method.traits
    if traits["scratch"]:
        yield "Takes the place of the weights, which are let go; everything else in the model trains too."
    for kind, mine in list(found.items())[:1]:
        if method.name != "lora" and not traits["scratch"]:
            yield f"Trains {_compared(mine, of_lora(kind))} at the default ranks."
    yield _folding(why_not_folded(method))
    if traits["gate"]:
        yield GATES.get(traits["gate"], "Differs from token to token, as a router says.")
    if traits["activations"]:
        yield "Acts on the output of modules, so no weight changes."
    if traits["plan"]:
        yield "Shares tensors or choices between all adapted weights; what is shared counts once for a model."
    names = _statistics(method)
    if names:
        yield f"Reads {names} in one pass over the data that you give."
    if traits["training"]:
        yield "Acts during training: call `rf.attach(model, optimizer, ...)` before the first step."


def _folding(reason: str) -> str:
    """Return what folding does, given the sentence that refuses it or ""."""
    if "no dense matrix" in reason:
        return "Cannot be folded: no single matrix stands for the change."
    return (
        f"Cannot be folded: {escaped(reason)}."
        if reason
        else "Folds into a stock model, which costs nothing."
    )


def _compared(mine: Cost, lora: Cost) -> str:
    ratio = mine.trained / lora.trained
    if 0.9 < ratio < 1.1:
        return "about as many numbers as LoRA"
    return (
        f"{ratio:.1f} times as many numbers as LoRA"
        if ratio > 1
        else f"{100 * ratio:.2g} % of the numbers of LoRA"
    )


def _of_init(method: rf.Method) -> Iterator[str]:
    yield f"Gives {'; or '.join(GIVES[kind] for kind in method.traits['gives'])}."
    names = _statistics(method)
    yield f"Reads {names} in one pass over the data that you give." if names else "Reads no data."
    if method.traits["rate"]:
        yield "Depends on the learning rate: pass `lr=`."
    if method.traits["dynamics"]:
        yield f"Cannot do without the dynamics {method.traits['dynamics']}."


def _of_ranks(method: rf.Method) -> Iterator[str]:
    if method.traits["dynamic"]:
        yield "Acts during training: call `rf.attach(model, optimizer, ...)` before the first step."
    else:
        yield "Decides before training."
    names = _statistics(method)
    yield f"Reads {names} in one pass over the data that you give." if names else "Reads no data."
    yield from _asked(method)


def _of_dynamics(method: rf.Method) -> Iterator[str]:
    traits = method.traits
    if traits["function"]:
        yield f"Is no part of a training: call `{traits['function']}`."
        return
    yield "Rides on the optimizer: call `rf.attach(model, optimizer, ...)` before the first step."
    yield from _asked(method)
    if traits["moves_base"]:
        yield "Moves changes into a copy of the stored weight, so a part of them is no longer of low rank."
    if traits["owns_step"]:
        yield "Replaces the optimizer's step of the pairs, which it can for Adam and AdamW."
    if traits["excludes"]:
        yield f"Cannot run beside {_listed(traits['excludes'])}."


def _of_optim(method: rf.Method) -> Iterator[str]:
    yield "Adds nothing to the model: it moves the weights themselves, and there is no adapter to save."
    called = f"Is called as `rf.optim.{method.build.__name__}(model, lr=...)`, in the place of any optimizer."
    yield str(method.traits.get("use", called))


def _of_compressor(method: rf.Method) -> Iterator[str]:
    traits = method.traits
    if "solves" not in traits:
        yield "Is called by itself and is no method of `rf.compress`."
        return
    yield f'Is called as `rf.compress(model, "{method.name}", ...)`.'
    needs = _statistics(method) if "needs" in traits else ""
    reads = "runs the model on `data` itself" if traits["whole"] and not needs else "reads no data"
    yield f"Reads {needs} from `data`." if needs else f"It {reads}, where its options do not say otherwise."
    if not traits["whole"]:
        yield f"Shares the numbers out by `{traits['share']}`, unless `share` says otherwise."
    if traits["rest_frozen"]:
        yield "Freezes what it does not replace."


def _of_rule(method: rf.Method) -> Iterator[str]:
    yield f'Is called as `rf.merge(models, "{method.name}", ...)`.'
    asked = {
        "needed": "Needs the base.",
        "optional": "Takes the base, where it is given.",
        "unused": "Asks for no base.",
    }
    yield asked[method.traits["base"]]
    if method.traits["linear"]:
        yield "Merges adapters exactly, by putting their factors side by side."
    if method.traits["whole"]:
        yield "Looks at all tensors together."


def _of_recipe(method: rf.Method) -> Iterator[str]:
    point = accepted_point(method)
    yield f"Is the point `{point.text()}` with the options of its paper; every part may be chosen apart, too."


def _asked(method: rf.Method) -> Iterator[str]:
    needs = sorted(asked_of_attach(resolve(accepted_point(method), {})))
    if needs:
        yield f"Asks `rf.attach` for {_listed(f'`{need}`' for need in needs)}."


def _statistics(method: rf.Method) -> str:
    needs = method.traits.get("needs", ())
    given = (dict(method.options),) if method.axis == "compress" else (dict(method.options), 2)
    found = needs(*given) if callable(needs) else needs
    return _listed(dict.fromkeys(f"`{need if isinstance(need, str) else need[0]}`" for need in found))


def _listed(words: Iterable[str]) -> str:
    found = list(words)
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}" if found else ""


def options(method: rf.Method) -> str:
    """Return the options with types, defaults and meaning."""
    meant, hints = described(method), inspect.signature(method.build).parameters
    rows = [
        (
            f"`{name}`",
            f"`{_type(hints[name])}`",
            f"`{value!r}`",
            _cell(escaped(meant.get(name, ""))),
        )
        for name, value in method.options.items()
    ]
    rank = method.traits.get("rank")
    words = _cell(escaped(meant.get("rank", "the rank of every weight.")))
    first = [("`rank`", "`int`", f"`{rank}`", words)] if rank else []
    if not rows and not first:
        return "None."
    lead = escaped((inspect.getdoc(method.build) or "").partition("\n")[0])
    return f"{lead}\n\n" + table(("option", "type", "default", "meaning"), first + rows)


def described(method: rf.Method) -> dict[str, str]:
    """Return what the docstring says of every option, or that of what it refers to in backquotes."""
    text = inspect.getdoc(method.build) or ""
    found = _arguments(text)
    for name in re.findall(r"`(\w+)`", text.partition("\n")[0]):
        other = vars(sys.modules[method.build.__module__]).get(name) or _build_of(method.axis, name)
        found = _arguments(inspect.getdoc(other) or "") | found
    return _of_lora(method) | found


def _of_lora(method: rf.Method) -> dict[str, str]:
    """Return what LoRA says of the options that a structure shares with it."""
    lora = rf.find_method("lora")
    if method.axis != "structure" or method is lora:
        return {}
    shared = {name for name, value in method.options.items() if lora.options.get(name, lora) == value}
    said = _arguments(inspect.getdoc(lora.build) or "")
    return {name: text for name, text in said.items() if name in shared}


def _build_of(axis: str, name: str) -> object:
    return next((m.build for m in rf.methods(axis) if m.name == name.replace("_", "-")), None)


def _arguments(text: str) -> dict[str, str]:
    sections = griffe.Docstring(text).parse("google", warnings=False)
    kinds = (griffe.DocstringSectionKind.parameters, griffe.DocstringSectionKind.attributes)
    found = [item for section in sections if section.kind in kinds for item in section.value]
    return {name: " ".join(item.description.split()) for item in found for name in item.name.split(", ")}


def _type(parameter: inspect.Parameter) -> str:
    hint = parameter.annotation
    text = hint if isinstance(hint, str) else inspect.formatannotation(hint)
    return re.sub(r"\b(\w+\.)+", "", text)


def cost(method: rf.Method, found: Mapping[str, Cost]) -> str:
    """Return what a method costs in layers of every kind."""
    if "cost" in method.traits:
        return str(method.traits["cost"])
    if method.axis == "optim":
        kept, adam = state_of(method), 2 * SIDE * SIDE
        return (
            f"For a weight {SIDE} x {SIDE} the optimizer keeps {kept:,} numbers with its defaults, "
            f"{100 * kept / adam:.2g} % of Adam's {adam:,}. The weight has a whole gradient."
        )
    if method.axis in JOBS:
        return "None when the model is used, beyond that of the weights which it leaves."
    if is_function(method):
        return "None during training, of which it is no part."
    if not found:
        return "It needs more than one layer, so it is not counted on one; the example shows what trains."
    rows = [_cost_row(one) for one in found.values()]
    rows += [_cost_row(of_lora(kind), "LoRA in the same: ") for kind in found if method.name != "lora"]
    words = (
        "its default rank"
        if space.axis_of(method) == "structure"
        else "the default rank of the structure that it is used with"
    )
    head = ("layer", "rank", "trained", "saved", "multiply-adds of a token", "over the frozen layer")
    return (
        f"At {words}, counted on the expression. Multiply-adds are those of one token, or one position, in "
        f"a batch of {TOKENS}, the frozen weight's included.\n\n{table(head, rows)}"
    )


def _cost_row(one: Cost, prefix: str = "") -> tuple[str, ...]:
    macs = ("not counted", "") if one.macs is None else (f"{round(one.macs):,}", f"{one.over:.3f}")
    rank = "" if one.rank is None else str(one.rank)
    layer = f"{prefix}{one.layer.partition(',')[0]}" if prefix else one.layer
    return (layer, rank, f"{one.trained:,}", f"{one.stored:,}", *macs)


@cache
def _verdicts() -> Mapping[tuple[str, str], list[tuple[rf.Method, space.Verdict]]]:
    """Return every verdict under both of its methods, with the other one."""
    found: dict[tuple[str, str], list[tuple[rf.Method, space.Verdict]]] = {}
    for verdict in space.pairs():
        for mine, other in ((verdict.first, verdict.second), (verdict.second, verdict.first)):
            found.setdefault((mine.axis, mine.name), []).append((other, verdict))
    return found


def partners(method: rf.Method) -> str:
    """Return which layers a method takes and which methods of the other axes."""
    if method.axis == "optim":
        return "Any model. It is no part of a point: it stands where the optimizer stands."
    if method.axis in JOBS:
        return "It is no part of a point: it takes a model, trained in any way, and gives one."
    if space.axis_of(method) == "pretrain":
        return "Any model and any optimizer. It is no part of a point."
    lines = [f"- The point `{accepted_point(method).text()}`."] if method.axis == "recipe" else []
    if method.traits.get("activations"):
        lines.append(f"- Modules: {_outputs(method)}.")
    elif space.axis_of(method) == "structure":
        lines.append(f"- Layers: {_listed(LAYER_WORDS.get(k, k) for k in method.traits['layers'])}.")
    verdicts = _verdicts().get((method.axis, method.name), [])
    for axis in dict.fromkeys(other.axis for other, _ in verdicts):
        taken = [_link(other) for other, verdict in verdicts if other.axis == axis and verdict.accepted]
        lines.append(f"- {AXES[axis][0]}: {', '.join(taken) or 'none'}.")
    refused = _refusals(method, verdicts)
    if refused:
        lines.append(
            '\n??? note "Why not with the others"\n\n' + "\n".join(f"    - {line}" for line in refused)
        )
    return "\n".join(lines)


def _outputs(method: rf.Method) -> str:
    """Return the modules whose outputs a method edits: any, or only those that its preset finds."""
    preset = method.traits["targets"]
    if 'targets=["0"]' in example(method):
        return f"the outputs of any, by default of `{preset}`"
    return f"{PRESETS[preset].partition(' (')[0]} (`{preset}`), no others"


def _refusals(method: rf.Method, verdicts: list[tuple[rf.Method, space.Verdict]]) -> list[str]:
    """Return the sentences of refusals, those that differ in the other method's name alone as one."""
    groups: dict[str, list[str]] = {}
    for other, verdict in verdicts:
        if not verdict.accepted:
            general = re.sub(rf"(?<![\w.-]){re.escape(other.name)}(?![\w-])", "this", verdict.reason)
            groups.setdefault(general if other.name != method.name else verdict.reason, []).append(other.name)
    return [f"{', '.join(dict.fromkeys(names))}: {escaped(text)}." for text, names in groups.items()]


def _link(other: rf.Method) -> str:
    return f"[{other.name}](../{other.axis}/{slug(other)}.md)"


def citation(method: rf.Method) -> str:
    """Return an entry for a bibliography."""
    author = re.search(
        rf"^([A-Z][\w'-]+)( et al\.| and [A-Z][\w'-]+)? {method.year}\.", method.doc, re.MULTILINE
    )
    fields = {"title": f"{{{method.title}}}", "year": str(method.year)}
    if author:
        others = (author[2] or "").replace(" et al.", " and others")
        fields = {"author": f"{author[1]}{others}"} | fields
    if method.arxiv:
        fields |= {
            "eprint": method.arxiv,
            "archivePrefix": "arXiv",
            "url": f"https://arxiv.org/abs/{method.arxiv}",
        }
    if method.code:
        fields["note"] = f"Code: https://github.com/{method.code}"
    key = re.sub(r"\W", "", method.name.replace("+", "plus")) + str(method.year)
    return "\n".join([f"@misc{{{key},", *(f"  {name} = {{{value}}}," for name, value in fields.items()), "}"])


# Markdown ---------------------------------------------------------------------------------------------


def _links(method: rf.Method) -> str:
    return f"{escaped(method.title)} · {_papers(method)} · `{method.build.__module__}`"


def _papers(method: rf.Method) -> str:
    links = [f"[arXiv {method.arxiv}](https://arxiv.org/abs/{method.arxiv})"] if method.arxiv else []
    links += [f"[{method.code}](https://github.com/{method.code})"] if method.code else []
    return ", ".join(links) or str(method.year)


def _paragraph(text: str) -> str:
    """Return a paragraph of a docstring; an indented one is an equation, and words in ** are bold."""
    if text.startswith(" "):
        return f"```text\n{inspect.cleandoc(text)}\n```"
    plain = escaped(text if text.startswith("- ") else " ".join(text.split()))
    return re.sub(r"(?<!\S)\\\*\\\*(?=\S)(.+?)(?<=\S)\\\*\\\*(?!\w)", r"**\1**", plain)


def escaped(text: str) -> str:
    """Return plain text that Markdown shows as it is; what stands in backquotes is code."""
    parts = re.split(r"(`[^`\n]+`)", text)
    return "".join(
        p if i % 2 else re.sub(r"([\\*_\[\]#])", r"\\\1", p).replace("<", "&lt;") for i, p in enumerate(parts)
    )


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table."""
    lines = [list(head)]
    lines += [["---"] * len(lines[0]), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    """Return text for a cell of a table; a bar inside of code needs no escape."""
    return text.replace("|", "\\|")
