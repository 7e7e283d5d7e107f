"""The values of a frame stand where a structure puts them; the product is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods._layers import normal

from rankfold.errors import InvalidOption
from rankfold.methods.framed import SPLITS, framed
from rankfold.methods.site import Basis


class Place:
    """A site that shows what is frozen, by name."""

    path = "layer"

    def __init__(self) -> None:
        self.frozen_values: dict[str, torch.Tensor] = {}

    def frozen(self, value: torch.Tensor, name: str) -> torch.Tensor:
        self.frozen_values[name] = value
        return value


BASIS = Basis(normal(5, 2), torch.tensor([2.0, -0.5]).double(), normal(2, 4, seed=2))


@pytest.mark.parametrize("values", SPLITS)
def test_the_values_multiply_the_frame_wherever_they_stand(values: str) -> None:
    place: Any = Place()
    eye: Any = torch.eye(2).double()
    found: Any = framed(place, BASIS, eye, values=values, prefix="a.")
    wanted = torch.eye(2).double() if values == "none" else BASIS.values.diag()
    torch.testing.assert_close(found, BASIS.left @ wanted @ BASIS.right)
    assert set(place.frozen_values) == {"a.left", "a.right"}
    assert (place.frozen_values["a.left"] is BASIS.left) == (values in ("none", "right"))
    assert (place.frozen_values["a.right"] is BASIS.right) == (values in ("none", "left"))


def test_an_unknown_place_of_the_values_is_refused_by_the_layers_name() -> None:
    place: Any = Place()
    with pytest.raises(InvalidOption, match="layer: values must be one of none, left, right, sqrt, not 'up'"):
        framed(place, BASIS, place, values="up")
