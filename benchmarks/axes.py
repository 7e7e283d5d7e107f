"""Calibration, starts, training steps and memory of initialisers, rank rules and dynamics, beside peft.

python benchmarks/axes.py [--parts start,step,memory] [--cases eva,adalora] [--rounds 5] [--json FILE] [--quick]

Every figure is a ratio to peft doing the same, or, where peft has no such method, to the floor that is named.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _measure import MEGA, Step, paired_ratios, print_header
from _minilm import Batch, MiniLM
from torch import Tensor, nn

import rankfold as rf

RATE = 1e-4
ADAMW = "lora, AdamW"
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


class Bench:
    """Everything that is measured, on one model and one set of batches."""

    def __init__(self, scale: Scale) -> None:
        self.scale, self.base = scale, MiniLM(scale.layers)
        self.batches = self.base.batches(max(scale.calibration, scale.steps), scale.rows, scale.tokens)
        self.few = self.batches[: scale.calibration]

    # Calibration and start --------------------------------------------------------------------------------

    def starts(self) -> list[Case]:
        few, single = self.few, [_row(batch, i) for batch in self.few for i in range(self.scale.rows)]
        data: dict[str, Any] = {"data": few, "progress": False}
        return [
            Case("eva, exact", "peft", lambda: self.started("lora", "eva", {}, data), self.peft_eva),
            Case(
                "eva, 4 iterations",
                "peft",
                lambda: self.started("lora", "eva", {"iterations": 4}, data),
                self.peft_eva,
            ),
            Case("lora-ga, exact", "peft", lambda: self.started("lora", "lora-ga", {}, data), self.peft_ga),
            Case(
                "lora-ga, 4 iterations",
                "peft",
                lambda: self.started("lora", "lora-ga", {"iterations": 4}, data),
                self.peft_ga,
            ),
            Case(
                "corda",
                "peft",
                lambda: self.started("lora", "corda", {}, {"data": single, "progress": False}),
                lambda: self.peft_corda(single),
            ),
            Case("pissa, exact", "peft", lambda: self.started("lora", "pissa", {}, {}), self.peft_pissa),
            Case("gradient", FULL, lambda: self.collected("gradient"), self.full_gradients),
            Case("squared_gradient", FULL, lambda: self.collected("squared_gradient"), self.full_gradients),
            Case(
                "squared_gradient_rows",
                FULL,
                lambda: self.collected("squared_gradient_rows"),
                self.full_gradients,
            ),
        ]

    def started(self, structure: str, init: str, options: dict[str, Any], given: dict[str, Any]) -> Step:
        recipe = rf.Recipe(structure, init=(init, options))
        rank, targets = self.scale.rank, self.base.linears
        return lambda: rf.adapt(self.base.fresh(), recipe, rank=rank, targets=targets, **given)

    def collected(self, statistic: str) -> Step:
        model, targets = self.base.fresh(), self.base.linears
        return lambda: rf.collect(model, self.few, statistic, targets=targets, progress=False)

    def full_gradients(self) -> Step:
        model = self.base.fresh()
        weights = [model.get_submodule(name).weight.requires_grad_(True) for name in self.base.linears]

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

    def peft_eva(self) -> Step:
        """Return peft's start with a tolerance of 0, which takes two batches, and all of them by `forward`."""
        import peft

        config = self.config(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0, tau=0.0))

        def step() -> None:
            model = peft.get_peft_model(self.base.fresh(), config)  # type: ignore[arg-type]
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
            peft.get_peft_model(model, config)  # type: ignore[arg-type]

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
            peft.get_peft_model(model, config)  # type: ignore[arg-type]

        return step

    def peft_pissa(self) -> Step:
        import peft

        config = self.config(init_lora_weights="pissa")
        return lambda: peft.get_peft_model(self.base.fresh(), config)  # type: ignore[arg-type]

    # Training steps -----------------------------------------------------------------------------------------

    def steps(self) -> list[Case]:
        every = self.scale.steps
        adalora = rf.Recipe("lora", ranks=("adalora", {"warmup": 0.0, "final": 0.1, "interval": every}))
        plain = rf.Recipe("lora")
        points = {
            "sora": rf.Recipe("lora", ranks="sora"),
            "relora": rf.Recipe("lora", dynamics=("relora",)),
            "allora": rf.Recipe("lora", dynamics=("allora",)),
            "lora-pro": rf.Recipe("lora", dynamics=("lora-pro",)),
            "loft": rf.Recipe("lora", dynamics=("loft",)),
        }
        return [
            Case("lora", "peft", lambda: self.trained(plain), lambda: self.peft_trained(self.config())),
            Case("adalora", "peft", lambda: self.trained(adalora), self.peft_adalora),
            Case(
                "lora+",
                "peft",
                lambda: self.trained(rf.Recipe("lora", dynamics=("lora+",))),
                self.peft_plus,
            ),
            *(
                Case(name, ADAMW, lambda point=point: self.trained(point), lambda: self.trained(plain))  # type: ignore[misc]
                for name, point in points.items()
            ),
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
        return peft.get_peft_model(self.base.fresh(), config).train()  # type: ignore[arg-type]

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
        return self.training(
            model, optimizer, lambda: model.base_model.update_and_allocate(next(taken))
        )

    def peft_plus(self) -> Step:
        from peft.optimizers import create_loraplus_optimizer

        model = self.peft_model(self.config())
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16.0)
        return self.training(model, optimizer, lambda: None)
