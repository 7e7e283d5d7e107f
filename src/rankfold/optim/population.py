"""A population of perturbed models: its members' forward pass, and the estimate that their fitness gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import InvalidOption
from .noise import Noise
from .perturbed import Perturbed, perturbable
from .seeds import hashed

_GENERATION = "eggroll_generation"


class Population:
    """Members around a model, evaluated together, and the step that their fitness asks for.

    Args:
        model: whose weights the optimizer holds.
        optimizer: is given the estimate as the gradient.
        population: members of a generation, even.
        rank: of perturbations.
        sigma: size of perturbations.
        group: members that share a mean fitness.
        reuse: generations that share their noise; 0 keeps one noise.
        frozen: words in the names of parameters that are not perturbed.
        seed: of all perturbations.

    Attributes:
        parameters: the perturbed ones, by name.
        layers: those with a perturbed parameter or none, by path.

    Raises:
        InvalidOption: nothing can be perturbed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        population: int,
        rank: int,
        sigma: float,
        group: int,
        reuse: int,
        frozen: tuple[str, ...],
        seed: int,
    ) -> None:
        self.optimizer, self.population, self.rank, self.sigma = optimizer, population, rank, sigma
        self.group, self.reuse, self.seed = group, reuse, seed
        self.layers = {path: m for path, m in model.named_modules() if perturbable(m)}
        owned = {id(p) for layer in self.layers.values() for p in layer.parameters(recurse=False)}
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        self.parameters = {
            name: p
            for name, p in model.named_parameters()
            if id(p) in owned & held and p.requires_grad and not any(word in name for word in frozen)
        }
        if not self.parameters:
            raise InvalidOption("eggroll: the optimizer holds no parameter of a layer that can be perturbed")
        self._met: set[str] = set()

    @property
    def generation(self) -> int:
        """How many steps were taken."""
        return int(self.optimizer.param_groups[0].setdefault(_GENERATION, 0))

    def repeated(self, batch: Tensor, members: range | None = None) -> Tensor:
        """Return a batch once for every member, one behind the other.

        Args:
            batch: (rows, ...).
            members: those of a part of the population.
        """
        return batch.repeat(len(self._members(members)), *[1] * (batch.dim() - 1))

    @contextmanager
    def perturbed(self, members: range | None = None) -> Iterator[None]:
        """Let the model's layers act as the members' for a while, without gradients.

        Args:
            members: those whose inputs stand one behind the other along the first axis, whole pairs; None
                means the whole population.

        Raises:
            InvalidOption: the members are no whole pairs.
        """
        chosen = self._members(members)
        pairs = range(chosen.start // 2, chosen.stop // 2)
        act = Perturbed(self._noise(), self.sigma, pairs, self.parameters.values(), self._met)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for path, layer in self.layers.items():
                if not act.chosen & {id(parameter) for parameter in layer.parameters(recurse=False)}:
                    continue
                handle = layer.register_forward_hook(act.hook(path, layer))
                stack.callback(handle.remove)
            yield

    def step(self, fitness: Tensor) -> None:
        """Estimate gradients from the members' fitness, and let the optimizer step.

        Args:
            fitness: (population,), which is to grow.

        Raises:
            InvalidOption: the fitness has another shape or is not finite, or no member was evaluated; nothing
                has changed.
        """
        if fitness.shape != (self.population,) or not bool(fitness.isfinite().all()):
            raise InvalidOption(
                f"eggroll: fitness must be {self.population} finite numbers, one for each member, not "
                f"{tuple(fitness.shape)}"
            )
        if not self._met:
            raise InvalidOption("eggroll: no member was evaluated under `perturbed()` since the last step")
        for name, gradient in self.estimate(self.standardised(fitness)).items():
            self.parameters[name].grad = gradient if name in self._met else None
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._met.clear()
        self.optimizer.param_groups[0][_GENERATION] = self.generation + 1

    def standardised(self, fitness: Tensor) -> Tensor:
        """Return (f - mean of the group) / sqrt(variance of all + 1e-5)."""
        wide = fitness.detach().float()
        centred = wide.view(-1, self.group) - wide.view(-1, self.group).mean(1, keepdim=True)
        return centred.flatten() / (wide.var(correction=0) + 1e-5).sqrt()

    @torch.no_grad()
    def estimate(self, fitness: Tensor) -> dict[str, Tensor]:
        """Return G of every perturbed parameter, from a fitness that is used as it is.

        Args:
            fitness: (population,).
        """
        noise, pairs = self._noise(), range(self.population // 2)
        halves = fitness.view(-1, 2)
        weights = (halves[:, 0] - halves[:, 1]) * (-self.sigma / self.population**0.5)
        return {name: self._estimate(noise, p, weights.to(p), pairs) for name, p in self.parameters.items()}

    def _estimate(self, noise: Noise, parameter: Tensor, weights: Tensor, pairs: range) -> Tensor:
        if parameter.dim() < 2:
            return (weights @ noise.vector(parameter, pairs)).view_as(parameter)
        left, right = noise.factors(parameter, pairs)
        weighted = left * (weights / self.rank**0.5)[:, None, None]
        wide = (each.transpose(0, 1).flatten(1) for each in (weighted, right))
        return torch.mm(next(wide), next(wide).T).view_as(parameter)

    def _noise(self) -> Noise:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        epoch = self.generation // self.reuse if self.reuse else 0
        return Noise(hashed(self.seed, "eggroll", epoch), self.rank, names)

    def _members(self, members: range | None) -> range:
        chosen = range(self.population) if members is None else members
        inside = 0 <= chosen.start < chosen.stop <= self.population
        if chosen.step != 1 or chosen.start % 2 or chosen.stop % 2 or not inside:
            raise InvalidOption(
                f"eggroll: members must be whole pairs of the {self.population}, not {members}"
            )
        return chosen
