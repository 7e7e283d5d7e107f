"""The documentation says what the code says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import rankfold as rf

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"


def test_the_example_of_the_contributors_page_is_the_method_of_the_tree():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    path = re.search(r"`(src/rankfold/methods/\S+\.py)`", text)[1]
    block = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1]
    assert block == (ROOT / path).read_text(encoding="utf-8").rstrip()


def test_the_contributors_initialiser_rank_rule_and_dynamics_run_from_a_package_of_their_own(tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1:]
    section, name, module = re.search(r"```toml\n\[project\.(.*?)\]\n(\S+) = \"(\S+)\"\n", text).groups()
    assert section == 'entry-points."rankfold.methods"'
    file = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    file.parent.mkdir(parents=True)
    file.write_text("\n\n".join(blocks), encoding="utf-8")
    announced = tmp_path / "my_package-1.dist-info"
    announced.mkdir()
    (announced / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n")
    (announced / "entry_points.txt").write_text(f"[rankfold.methods]\n{name} = {module}\n")
    result = subprocess.run([sys.executable, "-c", _TRAINING], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["2", "4", "6"]


_TRAINING = """
import torch, rankfold as rf
model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
rf.adapt(model, "lora/orthonormal/rising/averaged", rank=4, targets=["0", "1", "2"])
factor = model[0].expression.leaf("down").value
torch.testing.assert_close(factor @ factor.T, torch.eye(len(factor)))
before, optimizer = factor.detach().clone(), torch.optim.SGD(rf.param_groups(model, lr=0.1))
with rf.attach(model, optimizer):
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
    last = factor.detach().clone()
distance = (factor - before).norm() / (last - before).norm()
assert 0 < distance < 0.9, distance
print(*(len(model[i].expression.leaf("down").value) for i in range(3)))
"""


def test_every_command_that_the_readme_names_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`make ([a-z-]+)`", (ROOT / "README.md").read_text(encoding="utf-8"))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


AXES = {
    "Structures": "structure", "Initialisers": "init", "Ranks": "ranks", "Dynamics": "dynamics",
    "Optimizers": "optim", "From scratch": "pretrain",
}  # fmt: skip


@pytest.mark.parametrize("title", AXES)
def test_the_readme_lists_methods_that_exist_each_once_and_promises_no_more_of_them(title):
    row = re.search(rf"^\| {title} \| (.*) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)[1]
    groups = [group.rpartition(":")[2] for group in re.split(r"[.;]", row) if ":" in group]
    names = [name.strip() for group in groups for name in group.split(",")]
    known = {method.name for method in rf.methods(AXES[title])}
    assert set(names) <= known
    assert len(set(names)) == len(names)
    assert all(int(count) < len(known) for count in re.findall(r"more than (\d+)", row))


@pytest.mark.parametrize("name", ["auxiliary_loss", "gate_inputs", "remix_loss", "absorb", "join", "optim"])
def test_what_a_method_cannot_do_without_is_called_in_the_guide_and_named_in_the_readme(name):
    assert re.search(rf"\b{name}\b", README.read_text(encoding="utf-8"))
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "guide").glob("*.md")]
    code = "".join(block for page in pages for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    assert re.search(rf"\b{name}[(.]", code)


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    runnable = [block for block in blocks if "from_pretrained" not in block]
    assert runnable
    for block in runnable:
        result = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
