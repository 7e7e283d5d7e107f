"""Regional gating: every adapter acts inside its own box of the image only."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption, InvalidRank, NotDense

HEIGHT, WIDTH, CHANNELS = 4, 6, 5


def box(top: int, left: int, bottom: int, right: int) -> Tensor:
    mask = torch.zeros(HEIGHT, WIDTH)
    mask[top:bottom, left:right] = 1
    return mask


CAT, DOG = box(0, 0, 2, 3), box(2, 2, 4, 6)


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(CHANNELS, CHANNELS)).double()


def concepts() -> nn.Sequential:
    """Two LoRAs that were trained apart."""
    model = base()
    for name in ("cat", "dog"):
        rf.adapt(model, "lora", rank=2, alpha=3.0, targets="0", name=name)
        model[0].adapters[name].leaf("up").tensor().data.normal_()
    return model


def composed() -> nn.Sequential:
    model = concepts()
    for name in ("cat", "dog"):
        rf.adapt(model, "lora-composer", rank=2, of=name, targets="0", name=f"{name}-here")
    rf.use(model, ["cat-here", "dog-here"])
    return model


def image(height: int = HEIGHT, width: int = WIDTH, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, height * width, CHANNELS, dtype=torch.float64, generator=generator)


def test_outside_all_boxes_the_output_is_the_bases_bit_for_bit() -> None:
    model, x = composed(), image()
    with rf.gate_inputs(model, regions={"cat-here": CAT, "dog-here": DOG}):
        found = model(x)
    outside = (CAT + DOG).flatten() == 0
    assert torch.equal(found[:, outside], base()(x)[:, outside])
    assert not torch.isclose(found, base()(x))[:, ~outside].all(-1).any()


def test_inside_its_box_a_concept_is_the_trained_lora() -> None:
    model, x = composed(), image()
    with rf.gate_inputs(model, regions={"cat-here": CAT, "dog-here": DOG}):
        found = model(x)
    for name, mask in (("cat", CAT), ("dog", DOG)):
        rf.use(model, name)
        inside = mask.flatten() == 1
        torch.testing.assert_close(found[:, inside], model(x)[:, inside])


def test_one_box_over_everything_is_the_plain_lora() -> None:
    model, x = composed(), image()
    rf.use(model, "cat-here")
    with rf.gate_inputs(model, regions={"cat-here": torch.ones(HEIGHT, WIDTH)}):
        found = model(x)
    rf.use(model, "cat")
    torch.testing.assert_close(found, model(x))


def test_the_order_of_concepts_does_not_matter() -> None:
    model, x = composed(), image()
    with rf.gate_inputs(model, regions={"dog-here": DOG, "cat-here": CAT}):
        found = model(x)
        rf.use(model, ["dog-here", "cat-here"])
        torch.testing.assert_close(model(x), found)


def test_a_layer_of_another_resolution_sees_the_mask_resized() -> None:
    model, x = composed(), image(2, 3)
    with rf.gate_inputs(model, regions={"cat-here": CAT, "dog-here": DOG}):
        found = model(x)
    small = nn.functional.interpolate((CAT + DOG)[None, None], (2, 3), mode="nearest").flatten() > 0
    changed = ~torch.isclose(found, base()(x)).all(-1)
    assert torch.equal(changed, small.expand(2, -1))


def test_rows_may_have_boxes_of_their_own() -> None:
    model, x = composed(), image()
    rf.use(model, "cat-here")
    with rf.gate_inputs(model, regions={"cat-here": torch.stack([CAT, DOG])}):
        changed = ~torch.isclose(model(x), base()(x)).all(-1)
    assert torch.equal(changed, torch.stack([CAT, DOG]).flatten(1) == 1)


def test_concepts_that_were_trained_elsewhere_are_frozen() -> None:
    model = composed()
    assert not [name for name, value in model.named_parameters() if "-here" in name and value.requires_grad]


def test_the_file_stands_alone(tmp_path: Any) -> None:
    model, x = composed(), image()
    rf.save(model, tmp_path / "cat", name="cat-here")
    fresh = rf.load(base(), tmp_path / "cat", name="cat-here")
    rf.use(model, "cat-here")
    for each in (model, fresh):
        each.wanted = None
    with rf.gate_inputs(model, regions={"cat-here": CAT}), rf.gate_inputs(fresh, regions={"cat-here": CAT}):
        assert torch.equal(fresh(x), model(x))


def test_what_has_no_meaning_is_refused() -> None:
    model, x = composed(), image()
    with pytest.raises(InvalidOption, match="needs the region of 'cat-here'"):
        model(x)
    with (
        pytest.raises(InvalidOption, match=r"must be \(height, width\) or \(2, height, width\)"),
        rf.gate_inputs(model, regions={"cat-here": torch.ones(3, 4, 6), "dog-here": DOG}),
    ):
        model(x)
    with (
        pytest.raises(NotDense, match="the input is"),
        rf.gate_inputs(model, regions={"cat-here": CAT, "dog-here": DOG}),
    ):
        model(image(1, 7))
    with pytest.raises(NotDense, match="token to token"):
        rf.fold(model)
    with pytest.raises(InvalidRank, match="'cat' has rank 2; pass rank=2"):
        rf.adapt(concepts(), "lora-composer", rank=1, of="cat", targets="0")
    with pytest.raises(InvalidOption, match="no adapter 'bird'"):
        rf.adapt(concepts(), "lora-composer", of="bird", targets="0")
