"""The documentation says what the code says."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_catalogue_page_is_up_to_date():
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "make_catalogue.py"), "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_example_of_the_contributors_page_is_the_method_of_the_tree():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    path = re.search(r"`(src/rankfold/methods/\S+\.py)`", text)[1]
    block = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1]
    assert block == (ROOT / path).read_text(encoding="utf-8").rstrip()


def test_every_command_that_the_readme_names_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`make ([a-z-]+)`", (ROOT / "README.md").read_text(encoding="utf-8"))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    runnable = [block for block in blocks if "from_pretrained" not in block]
    assert runnable
    for block in runnable:
        result = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
