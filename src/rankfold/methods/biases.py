"""Biases for layers that have none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from ..errors import BaseMismatch, FormatError


@contextlib.contextmanager
def given_biases(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Give layers without a bias one of zeros; they lose it again if the block fails.

    Raises:
        BaseMismatch: there is no such layer, or it has a bias.
    """
    given: list[nn.Module] = []
    try:
        for path in paths:
            layer = dict(model.named_modules()).get(path)
            if layer is None or layer._parameters.get("weight") is None:
                raise BaseMismatch(f"{path} is to get a bias, and the model has no such layer")
            if layer._parameters.get("bias", layer) is not None:
                raise BaseMismatch(f"{path} is to get a bias and has one, or no place for one")
            weight = layer._parameters["weight"]
            assert weight is not None
            width = getattr(layer, "out_features", None) or weight.shape[0]
            layer._parameters["bias"] = nn.Parameter(weight.detach().new_zeros(width))
            given.append(layer)
        yield
    except BaseException:
        for layer in given:
            layer._parameters["bias"] = None
        raise


def biases_of(record: Mapping[str, Any]) -> list[str]:
    """Return the layers that an adapter gave a bias, by path.

    Raises:
        FormatError: the record holds something else.
    """
    paths = record.get("biases", [])
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise FormatError("the adapter's record does not list the layers that it gave a bias")
    return paths
