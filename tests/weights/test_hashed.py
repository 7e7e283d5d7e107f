"""Numbers read through a hash: which slots, how often, with which signs, and where gradients go."""

import torch
from torch import Tensor, nn

from rankfold.weights import CyclicChunks, Hashed, frozen

CHUNKS = CyclicChunks(10, (12345, 678901, 2345), 31415)


def weight(shape: tuple[int, int] = (5, 9), start: int = 7, chunks: CyclicChunks = CHUNKS) -> Hashed:
    owner = nn.Module()
    generator = torch.Generator().manual_seed(0)
    owner.pool = nn.Parameter(torch.randn(chunks.size, generator=generator, dtype=torch.float64))
    scale = frozen(torch.tensor(2.0, dtype=torch.float64), "scale")
    leaf = Hashed(owner, "pool", "weight", shape, chunks, start, scale)
    leaf.__dict__["kept"] = owner  # the reference to the owner is all that holds it here
    return leaf


def positions(leaf: Hashed) -> Tensor:
    return torch.arange(leaf.start, leaf.stop)


def test_a_run_of_positions_reads_the_slots_one_by_one() -> None:
    leaf = weight()
    read = [slot for first, last in CHUNKS.pieces(leaf.start, leaf.stop) for slot in range(first, last)]
    assert read == CHUNKS.slots(positions(leaf)).tolist()
    expected = [(CHUNKS.shift(g // 10) + g % 10) % 10 for g in range(leaf.start, leaf.stop)]
    assert read == expected


def test_every_chunk_is_a_cyclic_shift_of_the_array() -> None:
    for chunk in range(5):
        slots = CHUNKS.slots(torch.arange(10 * chunk, 10 * chunk + 10))
        assert sorted(slots.tolist()) == list(range(10))
        assert set(slots.diff().tolist()) <= {1, -9}


def test_chunks_are_shifted_by_the_hash_of_their_number() -> None:
    for chunk in range(6):
        assert CHUNKS.shift(chunk) == (12345 * chunk + 678901 * chunk**2 + 2345) % 2038074743 % 10
    assert len({CHUNKS.shift(chunk) for chunk in range(20)}) > 1


def test_signs_are_plus_and_minus_one_about_equally_often() -> None:
    signs = CHUNKS.signs(torch.arange(10_000))
    assert set(signs.tolist()) == {-1, 1}
    assert abs(signs.double().mean()) < 0.05
    for lag in (1, 2, 10, 64):
        assert abs((signs[lag:] * signs[:-lag]).double().mean()) < 0.05


def test_signs_are_the_last_bit_of_the_finaliser_of_murmurhash() -> None:
    def finalised(key: int) -> int:
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            key = (key ^ key >> 33) * factor % 2**64
        return key ^ key >> 33

    wanted = [1 - 2 * (finalised(g + CHUNKS.seed) % 2) for g in range(500)]
    assert CHUNKS.signs(torch.arange(500)).tolist() == wanted


def test_rows_and_gradients_are_those_of_the_whole_tensor() -> None:
    leaf = weight()
    value, slots = leaf.tensor(), CHUNKS.slots(positions(leaf))
    signs = CHUNKS.signs(positions(leaf))
    torch.testing.assert_close(value.flatten(), 2 * signs * leaf.pool()[slots])
    ids = torch.tensor([[4, 0], [2, 4]])
    torch.testing.assert_close(leaf.rows(ids), value[ids])
    probe = torch.arange(45.0, dtype=torch.float64)
    (grad,) = torch.autograd.grad((value.flatten() * probe).sum(), leaf.pool())
    wanted = torch.zeros(10, dtype=torch.float64).index_add(0, slots, 2 * signs * probe)
    torch.testing.assert_close(grad, wanted)


def test_loads_count_what_every_slot_serves() -> None:
    leaf = weight()
    assert torch.equal(leaf.loads().long(), CHUNKS.slots(positions(leaf)).bincount(minlength=10))


def test_nothing_but_the_array_and_the_number_is_held() -> None:
    leaf = weight()
    assert [name for name, _ in leaf.named_buffers()] == ["scale.value"]
    assert not list(leaf.parameters())
