"""What the tests of this folder share."""

from collections.abc import Iterator

import pytest

from rankfold import catalogue


@pytest.fixture
def clean() -> Iterator[None]:
    """Forget what a test registers."""
    catalogue.load_all()
    known = dict(catalogue._METHODS)
    yield
    catalogue._METHODS.clear()
    catalogue._METHODS.update(known)
