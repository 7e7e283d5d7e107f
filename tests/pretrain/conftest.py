import random
from pathlib import Path

import pytest

from rankfold.pretrain import PretrainConfig

WORDS = ("river", "stone", "the", "a", "under", "slowly", "carries", "bright", "morning", "and", "falls")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder of eight documents of eleven words."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    for number in range(8):
        lines = (" ".join(draw.choices(WORDS, k=9)) for _ in range(20))
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the curves where a test looks at them; a picture takes as long as the training."""
    if "curves" not in request.node.name:
        monkeypatch.setattr("rankfold.pretrain.run.draw_curves", lambda *args: None)


@pytest.fixture
def small(text: str, tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(
        "0.1M",
        str(tmp_path / "out"),
        data=(text,),
        held_out=0.2,
        vocab=270,
        length=16,
        batch_size=4,
        steps=4,
        lr=1e-2,
        save_steps=2,
        eval_steps=2,
        device="cpu",
    )
