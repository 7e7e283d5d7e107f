from pathlib import Path

import pytest
from training import tiny


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    return tiny.write_rows(tmp_path / "reviews.jsonl", tiny.review_rows())


@pytest.fixture
def notes(tmp_path: Path) -> str:
    file = tmp_path / "notes.txt"
    file.write_text("\n".join(tiny.SENTENCES * 6), encoding="utf-8")
    return str(file)
