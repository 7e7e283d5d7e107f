"""AirLLM: a conditional diffusion model proposes the vector of all ranks from the state of channel and task.

    r_i = r_min + floor((z_i + 1) / 2 (r_max - r_min)),   z in [-1, 1]^n
    e = e_u + w (e_c - e_u),   z_0 = (z_t - sqrt(1 - a_t) e) / sqrt(a_t)
    z_t' = sqrt(a_t') z_0 + sqrt(1 - a_t') e
    cost = bits / (capacity latency),   capacity = bandwidth log2(1 + snr)
    reward = -L - 0.1 cost where cost <= 1, else -10 cost, and no training step is taken

Yang et al. 2025. `Proposer` is an allocator (state) -> ranks: deterministic DDIM sampling (Song et al.
2021) of a small denoiser under classifier-free guidance (Ho and Salimans 2022). `denoising_loss` trains it
on ranks that were tried, weighted by their rewards, `clip(1 + 0.1 z-score, 0.1, 10)`; the condition is
dropped with probability 0.1. 1000 noise levels, betas linear in their roots from 1e-4 to 2e-2, 50 sampling
steps, w = 1.5 and ranks 1..64 are the official code's. The ranks chosen go into the point:

    found = dict(zip(paths, proposer.propose(state, generator=generator)[0].tolist()))
    rf.adapt(model, Recipe("lora", ranks=("airllm", {"ranks": found})), rank=8)

Deviations: **the configuration step only.** In the paper a PPO agent turns the state into the condition;
here the state itself is the condition, and there is no PPO. Start: the structure's and the initialiser's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...errors import InvalidOption
from ..limits import in_range
from ..registry import ranks
from ..rules import Unit
from ..tables import tabled

_LEVELS = 1000
_BETAS = (1e-4, 2e-2)


@ranks(
    "airllm",
    status="experimental",
    example={"ranks": {"*": 2}},
    title="AirLLM: Diffusion Policy-based Adaptive LoRA for Remote Fine-Tuning of LLM over the Air",
    year=2025,
    arxiv="2507.11515",
    code="ZJUNICE/AirLLM",
    formula="r_i = r_min + floor((z_i + 1)/2 (r_max - r_min)), z by guided DDIM from the state",
)
def airllm(units: Sequence[Unit], rank: int, *, ranks: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the ranks that a proposer has chosen.

    Args:
        units: the weights.
        rank: what alpha is divided by.
        ranks: by path, from `rankfold.methods.ranks.airllm.Proposer.propose`.
    """
    return tabled("airllm", units, ranks, "airllm.Proposer.propose(state)")


def decode(z: Tensor, least: int, most: int) -> Tensor:
    """Return whole ranks in least..most for z in [-1, 1]; what lies outside is clipped.

    Example:
        >>> decode(torch.tensor([-1.0, 0.0, 0.99, 1.0]), 1, 5).tolist()
        [1, 3, 4, 5]
    """
    return least + ((z.clamp(-1, 1) + 1) / 2 * (most - least)).floor().long()


def encode(ranks: Tensor, least: int, most: int) -> Tensor:
    """Return z in [-1, 1] in the middle of what decodes to the ranks."""
    if bool((ranks < least).any() or (ranks > most).any()):
        raise InvalidOption(f"the ranks {ranks.tolist()} are not all in {least}..{most}")
    return (2 * (ranks.double() + 0.5 - least) / max(most - least, 1) - 1).clamp(-1, 1)


def transmission_cost(
    numbers: int, *, bandwidth: float, snr: float, latency: float = 1.0, bits: int = 16
) -> float:
    """Return the share of the allowed time that sending takes, `bits / (bandwidth log2(1 + snr) latency)`.

    Args:
        numbers: parameters that are sent.
        bandwidth: in hertz.
        snr: ratio of signal to noise, not in decibels.
        latency: seconds that are allowed.
        bits: of one number.
    """
    return numbers * bits / (bandwidth * math.log2(1 + snr) * latency)


def penalised_reward(loss: float, cost: float, weight: float = 0.1, penalty: float = 10.0) -> float:
    """Return `-loss - weight cost`, or `-penalty cost` where the cost is above 1 and nothing is trained."""
    return -penalty * cost if cost > 1 else -loss - weight * cost


class Proposer(nn.Module):
    """A denoiser of rank vectors under a state, and its sampler.

    Args:
        weights: n, how many ranks a vector has.
        features: of the state, such as signal-to-noise ratio, bandwidth and the ranks of before.
        least, most: bounds of every rank.
        hidden: width of the network.
        seed: of its start.
    """

    signal: Tensor

    def __init__(
        self, weights: int, features: int, *, least: int = 1, most: int = 64, hidden: int = 256, seed: int = 0
    ) -> None:
        super().__init__()
        in_range("airllm", "[1, inf)", weights=weights, features=features, least=least, hidden=hidden)
        in_range("airllm", f"[{least}, inf)", most=most)
        self.weights, self.features, self.least, self.most = weights, features, least, most
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = nn.Sequential(
                nn.Linear(weights + features + 3, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                nn.Linear(hidden, weights),
            )  # fmt: skip
        first, last = (math.sqrt(beta) for beta in _BETAS)
        self.register_buffer("signal", (1 - torch.linspace(first, last, _LEVELS) ** 2).cumprod(0))

    def noise(self, z: Tensor, level: Tensor, state: Tensor, known: Tensor) -> Tensor:
        """Return the noise e in z (batch, n) at levels (batch,); where `known` is 0 the state is hidden."""
        angle = level[:, None] / _LEVELS * (math.pi / 2)
        known = known[:, None]
        return self.network(torch.cat([z, state * known, known, angle.sin(), angle.cos()], 1))  # type: ignore[no-any-return]

    @torch.no_grad()
    def sample(
        self,
        state: Tensor,
        *,
        guidance: float = 1.5,
        steps: int = 50,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return z (batch, n) in [-1, 1] for states (batch, features).

        Args:
            state: the conditions.
            guidance: w; 1 samples from the conditional model, 0 from the unconditional one.
            steps: of the sampler, in 1..1000.
            generator: of the noise that it starts from.
        """
        in_range("airllm", f"[1, {_LEVELS}]", steps=steps)
        count = len(state)
        z = torch.randn(count, self.weights, generator=generator).to(state)
        known = state.new_ones(count)
        levels = torch.linspace(_LEVELS - 1, 0, steps).round().long().tolist()
        for level, following in zip(levels, [*levels[1:], None], strict=True):
            here = state.new_full((count,), level)
            free = self.noise(z, here, state, 0 * known)
            error = free + guidance * (self.noise(z, here, state, known) - free)
            signal = self.signal[level]
            clean = ((z - (1 - signal).sqrt() * error) / signal.sqrt()).clamp(-1, 1)
            if following is None:
                return clean
            error = (z - signal.sqrt() * clean) / (1 - signal).sqrt()  # of what was clipped
            z = self.signal[following].sqrt() * clean + (1 - self.signal[following]).sqrt() * error
        raise AssertionError("the last level returns")

    def propose(
        self,
        state: Tensor,
        *,
        guidance: float = 1.5,
        steps: int = 50,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return whole ranks (batch, n) for states (batch, features); arguments as for `sample`."""
        z = self.sample(state, guidance=guidance, steps=steps, generator=generator)
        return decode(z, self.least, self.most)

    def denoising_loss(
        self, ranks: Tensor, state: Tensor, reward: Tensor, *, generator: torch.Generator | None = None,
        dropped: float = 0.1,
    ) -> Tensor:  # fmt: skip
        """Return the squared error of the noise in ranks that were tried, weighted by their rewards.

        Args:
            ranks: (batch, n).
            state: (batch, features) in which they were tried.
            reward: (batch,).
            generator: of noise, levels and dropped conditions.
            dropped: probability that the state is hidden, which guidance needs.
        """
        clean = encode(ranks, self.least, self.most).to(state)
        noise = torch.randn(clean.shape, generator=generator).to(state)
        level = torch.randint(_LEVELS, (len(clean),), generator=generator).to(state.device)
        known = (torch.rand(len(clean), generator=generator) >= dropped).to(state)
        signal = self.signal[level][:, None].to(state)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        error = self.noise(noisy, level.to(state), state, known) - noise
        return (reward_weights(reward).to(state) * error.square().mean(1)).mean()


def reward_weights(reward: Tensor) -> Tensor:
    """Return `clip(1 + 0.1 z-score, 0.1, 10)` of rewards (batch,)."""
    centred = reward - reward.mean()
    spread = centred.square().mean().sqrt()
    return (1 + 0.1 * centred / spread.clamp_min(1e-8)).clamp(0.1, 10)
