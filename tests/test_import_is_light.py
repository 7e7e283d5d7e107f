import importlib.util
import json
import subprocess
import sys

import pytest

HEAVY = [
    "accelerate",
    "bitsandbytes",
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "pandas",
    "peft",
    "rich",
    "scipy",
    "sklearn",
    "torchao",
    "transformers",
    "typer",
]


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    program = "import json, sys, rankfold; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("package", HEAVY)
def test_importing_rankfold_leaves_a_heavy_package_unloaded(package: str, loaded: set[str]) -> None:
    assert importlib.util.find_spec(package), f"{package} is not installed, so nothing would be shown"
    assert package not in loaded
