"""BlockShuffle: Monarch's map with orthonormal blocks."""

import torch
from methods._layers import expression_of, leaves_of, linear, normal, rank_of

import rankfold as rf
from rankfold.weights import Monarch, trained


def layer(out: int = 8, columns: int = 12, blocks: int = 2) -> torch.nn.Module:
    return rf.adapt(linear(out, columns), rf.Recipe(("block-shuffle", {"blocks": blocks})))


def test_it_is_monarchs_map_of_its_factors() -> None:
    model, x = layer(), normal(5, 12)
    leaves = leaves_of(model)
    same = Monarch(trained(leaves["left"], "left"), trained(leaves["right"], "right"), (8, 12))
    assert torch.equal(expression_of(model)(x), same(x))
    other = leaves_of(rf.adapt(linear(8, 12), rf.Recipe(("monarch", {"blocks": 2}))))
    assert {k: v.shape for k, v in other.items()} == {k: v.shape for k, v in leaves.items()}


def test_every_block_is_its_own_polar_factor() -> None:
    for leaf in leaves_of(layer(10, 12)).values():
        for block in leaf.detach():
            values = torch.linalg.svdvals(block)
            torch.testing.assert_close(values, torch.ones_like(values))


def test_it_has_full_rank_at_its_share_of_the_numbers() -> None:
    for blocks, share in ((2, 0.625), (4, 0.3125)):  # 63 % and 32 % of GPT-2's feed-forward weights
        model = layer(96, 24, blocks)
        weight = expression_of(model).dense()
        assert rank_of(weight.detach()) == 24
        assert expression_of(model).count().trainable == share * weight.numel()
