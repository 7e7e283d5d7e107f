"""LoGAH: a predictor of low-rank weights that looks at a network's graph."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from methods._layers import rank_of
from torch import Tensor, nn

from rankfold.errors import InvalidOption, InvalidRank
from rankfold.methods.hypertraining import train_hypernetwork
from rankfold.methods.networks import FAR, Node, graph_of
from rankfold.methods.scratch.logah import GraphHypernetwork


def predictor(**options: Any) -> GraphHypernetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GraphHypernetwork(
            **{"rank": 3, "hidden": 16, "layers": 2, "heads": 2, "largest": 64, **options}
        )


class Residual(nn.Module):
    """A convolution, a norm and a residual connection, then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, (3, 2)), nn.BatchNorm2d(8)
        self.body, self.head = nn.Conv2d(8, 8, 1, bias=False), nn.Linear(8, 5)
        self.position = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm(self.stem(x)))
        hidden = hidden + self.body(hidden)
        return self.head(hidden.mean((2, 3)) + self.position)  # type: ignore[no-any-return]


def perceptron(width: int = 20) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 4))


# The graph --------------------------------------------------------------------------------------------


def test_nodes_are_parameters_and_operations_in_the_order_of_the_computation() -> None:
    graph = graph_of(Residual())
    names = [node.name for node in graph.nodes if node.name]
    assert names == [
        "stem.weight", "stem.bias", "norm.weight", "norm.bias", "body.weight", "head.weight", "head.bias",
    ]  # fmt: skip
    kinds = {node.name: node.kind for node in graph.nodes if node.name}
    assert [kinds[name] for name in names] == ["weight", "bias", "gain", "bias", "weight", "weight", "bias"]
    assert [node.name for node in graph.nodes if node.rectified] == ["norm.weight", "norm.bias"]


def test_distances_are_those_of_the_shortest_ways() -> None:
    graph = graph_of(Residual())
    at = {node.name or node.kind: i for i, node in enumerate(graph.nodes)}
    distance = graph.distances
    assert distance[at["stem.weight"], at["norm.bias"]] == 3
    # Through the residual connection the body is passed by.
    add = at["body.weight"] + 1
    assert distance[at["rectifier"], at["body.weight"]] == distance[at["rectifier"], add] == 1
    assert distance[add, at["rectifier"]] == FAR
    assert not distance.diagonal().any()


def test_a_network_that_cannot_be_traced_is_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(InvalidOption, match="the graph of Branching cannot be traced"):
        graph_of(Branching())


def test_a_network_whose_forward_calls_no_layer_with_parameters_is_refused() -> None:
    with pytest.raises(InvalidOption, match="the graph of Linear holds no parameter"):
        predictor().initialise(nn.Linear(4, 4))


# Predictions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [perceptron(), Residual()], ids=["perceptron", "convolutions"])
def test_predicted_weights_have_their_shapes_and_at_most_the_rank(network: nn.Module) -> None:
    predicted = predictor()(graph_of(network))
    for name, parameter in network.named_parameters():
        if name != "position":
            assert predicted[name].shape == parameter.shape
    for value in predicted.values():
        if value.dim() == 4:  # (out, in, kh, kw) is a product of sides out kh and in kw
            value = value.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        if value.dim() == 2:
            assert rank_of(value.detach().double()) <= 3


def test_initialising_leaves_alone_what_the_graph_has_no_node_for() -> None:
    network = Residual()
    assert predictor().initialise(network) is network
    assert torch.equal(network.position, torch.ones(8))
    torch.testing.assert_close(network.body.weight, predictor()(graph_of(network))["body.weight"])


def predicted(
    shape: tuple[int, ...], kind: str = "weight", rectified: bool = False, **options: Any
) -> Tensor:
    """Return a prediction from one fixed square pair of matrices, whatever the shape."""
    made = predictor(**options)
    square = torch.randn(2, made.rank, made.rank, generator=torch.Generator().manual_seed(1)).relu()
    return made._predicted(Node(kind, "w", shape, rectified), square).detach()


def test_a_larger_weight_contains_the_smaller_one_up_to_its_fan_in() -> None:
    small, large = predicted((5, 7)), predicted((33, 50))
    torch.testing.assert_close(small * math.sqrt(7), large[:5, :7] * math.sqrt(50))


def test_fan_in_and_a_rectifier_set_the_size() -> None:
    torch.testing.assert_close(predicted((5, 7), rectified=True), math.sqrt(2) * predicted((5, 7)))
    window, flat = predicted((4, 2, 3, 2)), predicted((12, 4))
    unrolled = window.permute(0, 2, 1, 3).reshape(12, 4)
    torch.testing.assert_close(unrolled * math.sqrt(2 * 3 * 2), flat * math.sqrt(4))


def test_the_product_is_that_of_the_whole_decoder_viewed_as_two_sides() -> None:
    made = predictor()
    square = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(1)).relu()
    both = made.columns(square.flatten(0, 1)).reshape(2 * 64, 3)  # (2r, k) viewed as (2k, r)
    wanted = both[:10] @ both[64:80].T / math.sqrt(16)
    torch.testing.assert_close(made._predicted(Node("weight", "w", (10, 16)), square), wanted)


def test_gains_are_positive_below_two_and_biases_bounded() -> None:
    raw = predicted((9, 1))[:, 0]
    torch.testing.assert_close(predicted((9,), "gain"), 2 / (1 + torch.exp(-0.5 * raw)))
    torch.testing.assert_close(predicted((9,), "bias"), torch.tanh(0.2 * raw))


def test_its_size_does_not_depend_on_the_network() -> None:
    made = predictor(largest=400)
    count = sum(p.numel() for p in made.parameters())
    network = nn.Sequential(nn.Linear(6, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 4))
    made.initialise(network)
    assert count == sum(p.numel() for p in made.parameters()) < sum(p.numel() for p in network.parameters())


def test_where_a_node_stands_changes_what_is_predicted_for_it() -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    made = predictor()(graph_of(network))
    assert not torch.allclose(made["0.weight"], made["2.weight"], atol=1e-4)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"largest": 0}, {"hidden": 15}], ids=str)
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=f"logah: {next(iter(wrong))} must be"):
        predictor(**wrong)


def test_a_weight_that_is_too_large_is_refused() -> None:
    with pytest.raises(InvalidRank, match="logah: a side of 65 is more than largest = 64"):
        predictor()(graph_of(perceptron(65)))


# Training ---------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def sampled(generator: torch.Generator) -> nn.Module:
    """Return a perceptron of a random width."""
    width = int(torch.randint(16, 49, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def test_networks_that_were_never_seen_start_far_better_than_random_ones() -> None:
    pixels, wanted = digits()
    batches = list(zip(pixels[:1280].split(128), wanted[:1280].split(128), strict=True))
    made = predictor(rank=10, hidden=32, layers=1, largest=64)
    losses = train_hypernetwork(made, sampled, batches, steps=80, lr=1e-2)
    assert losses[-1] < 0.6 * losses[0]

    def accuracy(network: nn.Module) -> float:
        with torch.no_grad():
            return float((network(pixels[1280:]).argmax(1) == wanted[1280:]).float().mean())

    fresh = nn.Sequential(nn.Linear(64, 56), nn.ReLU(), nn.Linear(56, 10))  # wider than any that was seen
    assert accuracy(made.initialise(copy.deepcopy(fresh))) > accuracy(fresh) + 0.3


def test_training_is_determined_by_its_seed() -> None:
    x, y = torch.eye(64)[:16], torch.arange(16) % 10
    runs = [train_hypernetwork(predictor(), sampled, [(x, y)], steps=3, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"networks": 0}, {"warmup": 1.0}, {"lr": 0.0}, {"clip": -1.0}, {"weight_decay": -1.0}],
    ids=str,
)
def test_impossible_trainings_are_refused(wrong: dict[str, Any]) -> None:
    options = {"steps": 1, **wrong}
    with pytest.raises(InvalidOption, match=f"train_hypernetwork: {next(iter(wrong))} must be"):
        train_hypernetwork(predictor(), sampled, [(torch.eye(64), torch.zeros(64).long())], **options)
    with pytest.raises(InvalidOption, match="at least one batch"):
        train_hypernetwork(predictor(), sampled, [], steps=1)
