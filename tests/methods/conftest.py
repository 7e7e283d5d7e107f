"""What the tests of this folder share."""

from collections.abc import Iterator

import pytest

from rankfold.methods import registry


@pytest.fixture
def clean() -> Iterator[None]:
    """Forget what a test registers."""
    registry.load_all()
    known = dict(registry._METHODS)
    yield
    registry._METHODS.clear()
    registry._METHODS.update(known)
