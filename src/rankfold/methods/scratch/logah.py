"""LoGAH: a network that looks at another one's graph and predicts its weights as low-rank products.

    M_v = reshape(MLP(x_v), (2r, r)),   (2r, k) = relu(M_v) K,   viewed as (2k, r) = [A; B^T]
    W = sqrt(beta / fan_in) A[:out kh, :] B[:, :in kw],   as (out, kh, in, kw)

Zhou et al. 2024. x_v in R^h is the embedding of the parameter's node: kind, shape and degrees, then layers of
attention over the graph that is biased by distances (Graphormer, as in GHN-3). MLP: h, 4h, 8h, 2 r^2 with
ReLU; K (r, k) serves all nodes, so the predictor's size does not depend on the network's, and what it
predicts has at most rank r. A larger weight contains the smaller one of the same embedding, up to its fan-in.
beta = 2 before a rectifier, else 1; gains are 2 sigmoid(p / 2), biases tanh(p / 5); what the graph has no
node for is left alone. r = 32, h = 64, 3 layers, 8 heads and k = 32,768 are the paper's Tiny. Only the rows
of K's product that a weight needs are computed. Start: what the untrained predictor gives; train it on
sampled networks with
`rankfold.methods.hypertraining.train_hypernetwork`.

Deviations: the paper's declared linear map r to r, which its code never uses, is left out; shapes are read
by their logarithms; weights that two layers share are predicted once.

Use it to begin many networks of a family after training on small ones.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from ...catalogue import not_base, register
from ...errors import InvalidRank
from ..limits import in_range
from ..networks import Graph, Node, graph_of
from .graphormer import GraphEncoder


@register(
    "pretrain",
    "logah",
    title="LoGAH: Predicting 774-Million-Parameter Transformers using Graph HyperNetworks with 1/100 "
    "Parameters",
    year=2024,
    arxiv="2405.16287",
    code="Blackzxy/LoGAH",
    formula="W = sqrt(beta / fan_in) A[:out] B[:, :in], [A; B^T] = relu(MLP(x_v)) K",
    start=not_base("that of predicted weights of rank r"),
    traits={"cost": "One forward of the predictor for a whole network, before training; none after it."},
)
class GraphHypernetwork(nn.Module):
    """Predicts the parameters of networks from their graphs.

    Args:
        rank: r, the most that a predicted matrix has.
        hidden: h, width of the embeddings; a multiple of heads.
        layers: of attention over the graph.
        heads: of the attention.
        largest: k, the longest side, out kh or in kw, that can be predicted.

    Example:
        >>> import torch
        >>> predictor = GraphHypernetwork(rank=2, hidden=16, heads=2, largest=64)
        >>> network = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
        >>> int(torch.linalg.matrix_rank(predictor.initialise(network)[0].weight))
        2
    """

    def __init__(
        self, *, rank: int = 32, hidden: int = 64, layers: int = 3, heads: int = 8, largest: int = 32768
    ) -> None:
        super().__init__()
        in_range("logah", "[1, inf)", rank=rank, hidden=hidden, layers=layers, heads=heads, largest=largest)
        self.rank, self.largest = rank, largest
        self.encoder = GraphEncoder(hidden, layers, heads)
        sizes = (hidden, 4 * hidden, 8 * hidden, 2 * rank * rank)
        steps = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.decoder = nn.Sequential(steps[0], nn.ReLU(), steps[1], nn.ReLU(), steps[2])
        self.columns = nn.Linear(rank, largest)

    def forward(self, graph: Graph) -> dict[str, Tensor]:
        """Return the predicted parameters by name.

        Raises:
            InvalidRank: a weight is larger than `largest`.
        """
        squares = self.decoder(self.encoder(graph)).relu().view(-1, 2, self.rank, self.rank)
        pairs = zip(graph.nodes, squares, strict=True)
        return {node.name: self._predicted(node, square) for node, square in pairs if node.name}

    @torch.no_grad()
    def initialise(self, network: nn.Module) -> nn.Module:
        """Put predicted values into a network, in place, and return it."""
        predicted = self(graph_of(network))
        for name, parameter in network.named_parameters():
            if name in predicted:
                parameter.copy_(predicted[name])
        return network

    def _predicted(self, node: Node, square: Tensor) -> Tensor:
        out, columns, *window = (*node.shape, 1, 1)[: max(2, len(node.shape))]
        height, width = (math.prod(window[:-1]), window[-1]) if window else (1, 1)
        up, down = (
            self._side(part, n) for part, n in zip(square, (out * height, columns * width), strict=True)
        )
        found = (up @ down.T).view(out, height, columns, width).transpose(1, 2).reshape(node.shape)
        if node.kind == "gain":
            return 2 * torch.sigmoid(0.5 * found)
        if node.kind == "bias":
            return torch.tanh(0.2 * found)
        return found * math.sqrt((2 if node.rectified else 1) / (columns * height * width))

    def _side(self, square: Tensor, length: int) -> Tensor:
        """Return the first rows (length, r) of relu(M) K, viewed as (k, r)."""
        if length > self.largest:
            raise InvalidRank(f"logah: a side of {length} is more than largest = {self.largest}")
        rows = math.ceil(length * self.rank / self.largest)
        flat: Tensor = self.columns(square[:rows]).flatten()
        return flat[: length * self.rank].view(length, self.rank)
