"""Calibration, starts, training steps and memory of initialisers, rank rules and dynamics, beside peft.

python benchmarks/axes.py [--parts start,step,memory] [--cases eva,sora] [--rounds 5] [--json FILE] [--quick]

Every figure is a ratio to peft doing the same, or, where peft has no such method, to the floor that is named.
"""

import argparse
import gc
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from _measure import MEGA, Step, paired_ratios, print_header
from _minilm import Batch, MiniLM
from torch import Tensor, nn

import rankfold as rf

RATE, TOTAL = 1e-4, 10_000  # learning rate and steps of trainings of which only a piece is measured
PLAIN = "lora"
FULL = "forward + backward"


@dataclass(frozen=True)
class Scale:
    """What is measured on.

    Attributes:
        rank: of the changes.
        calibration: batches of a calibration.
        steps: optimizer steps in one measured piece, among them one event of a rule with events.
        rows: of a batch.
        tokens: of a row.
        layers: of the encoder; None keeps all six.
    """

    rank: int = 8
    calibration: int = 4
    steps: int = 4
    rows: int = 8
    tokens: int = 64
    layers: int | None = None


QUICK = Scale(rank=2, calibration=2, steps=2, rows=2, tokens=8, layers=1)


@dataclass(frozen=True)
class Case:
    """What rankfold does, and what it is compared with.

    Attributes:
        name: of the method.
        against: what the floor is.
        ours: makes the step that is measured.
        floor: makes the step that it is measured against.
    """

    name: str
    against: str
    ours: Callable[[], Step]
    floor: Callable[[], Step]


@dataclass(frozen=True)
class Ratio:
    """A figure over that of a floor.

    Attributes:
        ratio: of the two.
        against: what the floor is.
        ours, floor: bytes, where bytes were counted.
    """

    ratio: float
    against: str
    ours: int | None = None
    floor: int | None = None


class Bench:
    """Everything that is measured, on one model and one set of batches."""

    def __init__(self, scale: Scale) -> None:
        self.scale, self.base = scale, MiniLM(scale.layers)
        self.batches = self.base.batches(max(scale.calibration, scale.steps), scale.rows, scale.tokens)
        self.few = self.batches[: scale.calibration]

    # Calibration and start --------------------------------------------------------------------------------

    def starts(self) -> list[Case]:
        return [*self.calibrated(), *self.gradients()]

    def calibrated(self) -> list[Case]:
        few, started = self.few, self.started
        once = partial(self.peft_eva, -2.0)  # all directions agree, so that peft is done after two batches
        rows = [_row(batch, i) for batch in few for i in range(self.scale.rows)]
        return [
            Case("eva", "peft", started("eva", few[:2]), once),
            Case("eva, randomised", "peft", started("eva", few[:2], iterations=4), once),
            Case("eva, peft until it agrees", "peft", started("eva", few), lambda: self.peft_eva(0.99)),
            Case("lora-ga", "peft", started("lora-ga", few), self.peft_ga),
            Case("lora-ga, randomised", "peft", started("lora-ga", few, iterations=4), self.peft_ga),
            Case("pissa", "peft", started("pissa", None), self.peft_pissa),
            Case("corda", "peft", started("corda", rows), lambda: self.peft_corda(rows)),
        ][: None if find_spec("attr") else -1]  # peft's corda imports attrs, which it does not depend on

    def gradients(self) -> list[Case]:
        names = ("gradient", "squared_gradient", "squared_gradient_rows")
        return [Case(name, FULL, partial(self.collected, name), self.full_gradients) for name in names]

    def started(self, init: str, data: list[Batch] | None, **options: Any) -> Callable[[], Step]:
        recipe = rf.Recipe("lora", init=(init, options))
        given: dict[str, Any] = {
            "rank": self.scale.rank,
            "targets": self.base.linears,
            "data": data,
            "progress": False,
        }
        return lambda: lambda: rf.adapt(self.base.fresh(), recipe, **given)

    def collected(self, statistic: str) -> Step:
        model, targets = self.base.fresh(), self.base.linears
        return lambda: rf.collect(model, self.few, statistic, targets=targets, progress=False)

    def full_gradients(self) -> Step:
        model = self.base.fresh()
        weights = [w.requires_grad_(True) for w in self.base.weights(model)]

        def step() -> None:
            for batch in self.few:
                model(**batch).loss.backward()
            for weight in weights:
                weight.grad = None

        return step

    def config(self, **options: Any) -> Any:
        import peft

        rank = self.scale.rank
        return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(self.base.linears), **options)

    def peft_eva(self, tolerance: float) -> Step:
        """Return peft's start, which repeats the batches until directions agree, signs included."""
        import peft

        eva = peft.EvaConfig(rho=1.0, use_label_mask=False)
        eva.tau = tolerance  # set here, because the constructor takes none that all pairs of directions meet
        config = self.config(init_lora_weights="eva", eva_config=eva)

        def step() -> None:
            model = peft.get_peft_model(self.base.fresh(), config)
            peft.initialize_lora_eva_weights(model, self.few, show_progress_bar=False)

        return step

    def peft_ga(self) -> Step:
        import peft
        from peft.tuners.lora.loraga import preprocess_loraga

        config = self.config(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())

        def step() -> None:
            model = self.base.fresh()

            def run() -> None:
                for batch in self.few:
                    model(**batch).loss.backward()

            preprocess_loraga(model, config, run)
            peft.get_peft_model(model, config)

        return step

    def peft_corda(self, rows: list[Batch]) -> Step:
        import peft
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        config = self.config(init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))

        def step() -> None:
            model = self.base.fresh()

            @torch.no_grad()
            def run() -> None:
                for row in rows:
                    model(**row)

            preprocess_corda(model, config, run)
            peft.get_peft_model(model, config)

        return step

    def peft_pissa(self) -> Step:
        import peft

        config = self.config(init_lora_weights="pissa")
        return lambda: peft.get_peft_model(self.base.fresh(), config)

    # Training steps -----------------------------------------------------------------------------------------

    def steps(self) -> list[Case]:
        adalora = ("adalora", {"warmup": 0.0, "final": 0.1, "interval": self.scale.steps})
        plain = partial(self.trained, rf.Recipe("lora"))
        plus = rf.Recipe("lora", dynamics=("lora+",))
        others = {
            name: rf.Recipe("lora", dynamics=(name,)) for name in ("relora", "allora", "lora-pro", "loft")
        }
        others["sora"] = rf.Recipe("lora", ranks="sora")
        return [
            Case("lora", "peft", plain, lambda: self.peft_trained(self.config())),
            Case(
                "adalora", "peft", partial(self.trained, rf.Recipe("lora", ranks=adalora)), self.peft_adalora
            ),
            Case("lora+", "peft", partial(self.trained, plus), self.peft_plus),
            *(Case(name, PLAIN, partial(self.trained, point), plain) for name, point in others.items()),
        ]

    def adapted(self, recipe: rf.Recipe) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = rf.adapt(self.base.fresh(), recipe, rank=self.scale.rank, targets=self.base.linears).train()
        return model, torch.optim.AdamW(rf.param_groups(model, lr=RATE))

    def trained(self, recipe: rf.Recipe) -> Step:
        model, optimizer = self.adapted(recipe)
        handle = rf.attach(model, optimizer, total_steps=TOTAL)
        return self.training(model, optimizer, lambda: handle)

    def training(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, after: Callable[[], object]
    ) -> Step:
        """Return a function that takes some steps, and does something after each."""

        def step() -> None:
            for batch in self.batches[: self.scale.steps]:
                model(**batch).loss.backward()
                optimizer.step()
                after()
                optimizer.zero_grad()

        return step

    def peft_trained(self, config: Any) -> Step:
        model = self.peft_model(config)
        return self.training(model, torch.optim.AdamW(_trainable(model), lr=RATE), lambda: None)

    def peft_model(self, config: Any) -> Any:
        import peft

        config.modules_to_save = ["classifier"]
        return peft.get_peft_model(self.base.fresh(), config).train()

    def peft_adalora(self) -> Step:
        import peft

        rank = self.scale.rank
        config = peft.AdaLoraConfig(
            init_r=rank + rank // 2, target_r=rank, lora_alpha=rank, tinit=0, tfinal=TOTAL // 10,
            deltaT=self.scale.steps, total_step=TOTAL, target_modules=list(self.base.linears),
        )  # fmt: skip
        model = self.peft_model(config)
        taken = iter(range(TOTAL))
        optimizer = torch.optim.AdamW(_trainable(model), lr=RATE)
        return self.training(model, optimizer, lambda: model.base_model.update_and_allocate(next(taken)))

    def peft_plus(self) -> Step:
        from peft.optimizers import create_loraplus_optimizer

        model = self.peft_model(self.config())
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16.0)
        return self.training(model, optimizer, lambda: None)

    # Memory -------------------------------------------------------------------------------------------------

    def peaks(self) -> dict[str, Ratio]:
        """Return the ratios of peaks of allocated memory, the copy of the weights left out."""
        copied = sum(weight.nbytes for weight in self.base.weights(self.base.model))
        cases = [(case, copied) for case in self.calibrated()] + [(case, 0) for case in self.gradients()]
        return {
            case.name: of_bytes(
                case.against, *(peak_bytes(make()) - less for make in (case.ours, case.floor))
            )
            for case, less in cases
        }

    def gradients_alive(self) -> Ratio:
        """Return the most bytes of gradients that are alive at once, over those of the largest weight."""
        model = self.base.fresh()
        weights = self.base.weights(model)
        alive: list[int] = []

        def arrived(parameter: Tensor) -> None:
            alive.append(sum(w.grad.nbytes for w in weights if w.grad is not None))

        for weight in weights:
            weight.requires_grad_(True).register_post_accumulate_grad_hook(arrived)
        rf.collect(model, self.few, "squared_gradient_rows", targets=self.base.linears, progress=False)
        largest = max(weight.nbytes for weight in weights)
        return of_bytes("one weight", max(alive), largest)

    def states(self) -> dict[str, Ratio]:
        """Return the bytes of optimizer states over those of AdamW on the weights themselves."""
        model = self.base.fresh()
        weights = [w.requires_grad_(True) for w in self.base.weights(model)]
        full = torch.optim.AdamW(weights, lr=RATE)
        self.training(model, full, lambda: None)()
        of_full = state_bytes(full)
        found = {}
        for name in ("lora-pro", "loft"):
            model, optimizer = self.adapted(rf.Recipe("lora", dynamics=(name,)))
            with rf.attach(model, optimizer, total_steps=TOTAL):
                self.training(model, optimizer, lambda: None)()
            found[name] = of_bytes("AdamW on the weights", state_bytes(optimizer), of_full)
        return found


def of_bytes(against: str, ours: int, floor: int) -> Ratio:
    return Ratio(ours / floor, against, ours, floor)


def _row(batch: Batch, index: int) -> Batch:
    """Return one row of a batch without its padding."""
    length = int(batch["attention_mask"][index].sum())
    row = {key: value[index : index + 1] for key, value in batch.items()}
    return {key: value if key == "labels" else value[:, :length] for key, value in row.items()}


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def peak_bytes(step: Step) -> int:
    """Return the most bytes of tensors that a step has allocated at once, above those there were before."""
    step()
    gc.collect()  # what goes during the step would be taken for memory that it gave back
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors in an optimizer's state, what dynamics remember included."""
    whole = optimizer.state_dict()
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(whole)}.values()
    )


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


def timed(cases: list[Case], rounds: int) -> Iterator[tuple[str, Ratio]]:
    """Yield the ratio of CPU times of every case."""
    for case in cases:
        ratio = paired_ratios(case.floor(), {case.name: case.ours()}, rounds)[case.name]
        yield case.name, Ratio(ratio, case.against)


def line(name: str, found: Ratio) -> str:
    counts = "" if found.ours is None else f"{found.ours / MEGA:10.1f}{(found.floor or 0) / MEGA:10.1f}"
    return f"{name:34}{found.against:24}{found.ratio:8.2f}{counts}"


def measured(bench: Bench, part: str, wanted: set[str], rounds: int) -> Iterator[tuple[str, Ratio]]:
    """Yield the figures of a part."""
    if part == "memory":
        yield from ((f"peak, {name}", found) for name, found in bench.peaks().items())
        yield "gradients alive", bench.gradients_alive()
        yield from ((f"state, {name}", found) for name, found in bench.states().items())
        return
    cases = bench.starts() if part == "start" else bench.steps()
    yield from timed([case for case in cases if not wanted or case.name.partition(",")[0] in wanted], rounds)


PARTS = ("start", "step", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; all by default")
    parser.add_argument("--cases", default="", help="of starts and steps, comma-separated; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--quick", action="store_true", help="one small layer, once, to see that all runs")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} unknown; choose from {', '.join(PARTS)}")
    scale, rounds = (QUICK, 1) if arguments.quick else (Scale(), arguments.rounds)
    bench, wanted = Bench(scale), set(filter(None, arguments.cases.split(",")))
    print_header(
        "Initialisers, rank rules and dynamics, as ratios to peft or to a floor",
        f"MiniLM, its {len(bench.base.linears)} encoder linears at rank {scale.rank}, docstrings of the "
        f"standard library, {scale.rows} x {scale.tokens} tokens, float32.",
        f"start: {scale.calibration} batches and the start; CPU time, median of {rounds} rounds.",
        f"step: {scale.steps} optimizer steps with AdamW, among them one choice of adalora's.",
        "memory: peak of allocated tensors; bytes in the optimizer's state (MB: rankfold, then the floor).",
    )
    found: dict[str, dict[str, Any]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in arguments.parts.split(","):
            for name, ratio in measured(bench, part, wanted, rounds):
                print(line(name, ratio), flush=True)
                found[f"{part}: {name}"] = asdict(ratio)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
