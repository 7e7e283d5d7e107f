import gc
import importlib.util
import json
import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig

import rankfold as rf
from rankfold.compression import run as job
from rankfold.compression.config import CompressConfig
from rankfold.compression.ledger import Ledger
from rankfold.compression.run import plan_compression, run_compression
from rankfold.errors import FormatError, Incompatible, InvalidOption, OutputExists, RankfoldError
from rankfold.pretrain import load_pretrained
from rankfold.training.base import load_as_saved
from rankfold.training.data import DataError
from rankfold.training.finished import load_finished


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the spectra where a test looks at them."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(job, "draw_spectra", lambda *args: None)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a file of 60 lines of nine words."""
    draw, words = random.Random(0), " ".join(tiny.SENTENCES).split()
    file = tmp_path_factory.mktemp("text") / "notes.txt"
    lines = (" ".join(draw.choices(words, k=9)) for _ in range(60))
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


@pytest.fixture
def small(llama: str, text: str, tmp_path: Path) -> CompressConfig:
    out = str(tmp_path / "out")
    return CompressConfig(llama, out, data=text, keep=0.6, length=16, batch_size=4, device="cpu")


def _run(config: CompressConfig, **options: Any) -> dict[str, Any]:
    return run_compression(config, progress=False, **options).to_dict()


def _tensors(out: str | None) -> dict[str, torch.Tensor]:
    return load_file(Path(str(out)) / "structure" / "rankfold.safetensors")


def _interrupted(monkeypatch: pytest.MonkeyPatch, after: int, act: Callable[[], object]) -> list[str]:
    """Interrupt `act` when so many weights are solved, and return their paths."""
    solved: list[str] = []
    usual = Ledger.__setitem__

    def kept(self: Ledger, path: str, found: Any) -> None:
        if len(solved) == after:
            raise KeyboardInterrupt
        solved.append(path)
        usual(self, path, found)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "__setitem__", kept)
        with pytest.raises(KeyboardInterrupt):
            act()
    return solved


def test_a_compressed_model_loads_in_one_call_and_is_what_was_measured(small: CompressConfig) -> None:
    result = _run(small)
    model, tokenizer = load_finished(str(small.out))
    assert tokenizer is not None
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.model.layers[0].mlp.up_proj.expression.small_rank() == 12  # floor(0.6 * 64 * 32 / 96)
    numbers = rf.count(model).stored
    assert numbers == result["after"]["parameters"] == result["predicted_parameters"]
    assert numbers < result["before"]["parameters"]
    assert result["flops_ratio"] == pytest.approx(result["kept"], rel=0.1)
    assert result["before"]["score"]["perplexity"] != result["after"]["score"]["perplexity"]
    assert result["loads_with"] == f"rankfold.training.finished.load_finished({small.out!r})"
    assert type(load_pretrained(str(small.out))[0]) is type(model)
    assert model.generation_config.eos_token_id == model.config.eos_token_id


def test_a_stock_model_of_the_same_function_comes_of_the_dense_form(
    small: CompressConfig, tmp_path: Path
) -> None:
    _run(small)
    dense = replace(small, out=str(tmp_path / "dense"), form="dense")
    _run(dense)
    ids = torch.arange(8)[None]
    stock = AutoModelForCausalLM.from_pretrained(str(dense.out))
    own, _ = load_finished(str(small.out))
    torch.testing.assert_close(stock(ids).logits, own(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_report_names_every_weight_and_keeps_its_spectrum(small: CompressConfig) -> None:
    _run(small)
    report = json.loads((Path(str(small.out)) / "report.json").read_text())
    assert len(report["rows"]) == 14
    row = report["rows"][0]
    assert row["weight"] == "model.layers.0.self_attn.q_proj"
    assert row["rank"] == 9  # floor(0.6 * 32 * 32 / 64)
    assert 0 < row["error"] < row["plain_error"] < 1  # the method's own metric is what it makes small
    assert len(row["spectrum"]) == 32
    assert {"before", "after", "latency_ratio", "predicted_parameters"} <= set(report)


@pytest.mark.parametrize("calibration", ["parallel", "sequential"])
def test_an_interrupted_compression_goes_on_at_its_layer_to_the_same_bits(
    calibration: str, small: CompressConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(small, calibration=calibration)
    _run(replace(config, out=str(tmp_path / "whole")))
    done = _interrupted(monkeypatch, 5, lambda: _run(config))
    assert not (Path(str(config.out)) / "config.json").exists()
    solved: list[str] = []
    usual = Ledger.__setitem__
    monkeypatch.setattr(
        Ledger, "__setitem__", lambda self, path, found: (solved.append(path), usual(self, path, found))
    )
    _run(config, resume=True)
    assert len(done) == 5
    if calibration == "parallel":
        assert not set(done) & set(solved)
    first, second = _tensors(config.out), _tensors(str(tmp_path / "whole"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not (Path(str(config.out)) / "checkpoints").exists()


def test_a_resumed_compression_keeps_its_settings_and_its_text(
    small: CompressConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupted(monkeypatch, 2, lambda: _run(small))
    with pytest.raises(InvalidOption, match=r"keep was 0\.6 in .* and is 0\.5 now"):
        _run(replace(small, keep=0.5), resume=True)
    with pytest.raises(OutputExists, match="not empty"):
        _run(small)
    file = Path(str(small.data))
    content = file.read_text()
    try:
        file.write_text(content.replace("fox", "dog"))
        with pytest.raises(InvalidOption, match="the text is not the one"):
            _run(small, resume=True)
    finally:
        file.write_text(content)
    assert _run(small, overwrite=True)["after"]["score"]


def test_a_finished_compression_that_is_resumed_says_what_it_had_found(
    small: CompressConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_compression(small, progress=False)
    monkeypatch.setattr(job, "prepare", None)  # nothing is loaded again
    again = run_compression(small, resume=True)
    assert again.to_dict() == first.to_dict()
    assert str(again) == str(first)


def test_an_encoder_is_measured_by_its_embeddings_of_unseen_text(
    bert: str, text: str, tmp_path: Path
) -> None:
    found = {}
    for keep in (0.4, 0.9):
        out = str(tmp_path / str(keep))
        found[keep] = _run(CompressConfig(bert, out, data=text, keep=keep, device="cpu"))["similarity"]
    assert 0.3 < found[0.4] < found[0.9] < 1
    model, _ = load_finished(out)
    assert type(model).__name__ == "BertModel"


def test_a_classifier_is_measured_by_its_accuracy(bert: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    labels = {0: "bad", 1: "good"}
    ids = {name: number for number, name in labels.items()}
    config = BertConfig.from_pretrained(bert, id2label=labels, label2id=ids)
    folder = tmp_path / "classifier"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny.tokenizer(beginning="[CLS]", end="[SEP]", closes=True).save_pretrained(folder)
    data = tiny.write_rows(tmp_path / "reviews.jsonl", tiny.review_rows(32))
    out = str(tmp_path / "out")
    settings = CompressConfig(str(folder), out, data=data, keep=0.5, device="cpu", targets=("attention",))
    result = _run(settings)
    assert {"accuracy", "count"} <= set(result["after"]["score"])
    bad = tiny.write_rows(tmp_path / "bad.jsonl", [{"text": "a good film", "label": "fair"}] * 2)
    with pytest.raises(DataError, match="has labels in label that the model does not: it has bad, good"):
        plan_compression(replace(settings, eval_data=bad))


def test_how_much_text_is_used_is_said_and_a_share_is_never_seen(small: CompressConfig, text: str) -> None:
    plan = plan_compression(small)
    words = sum(len(line.split()) for line in Path(text).read_text().splitlines())
    blocks = words // 16
    held_out = -(-blocks // 10)
    assert plan.facts["unseen_sequences"] == held_out
    assert plan.facts["tokens"] == 16 * (blocks - held_out)
    assert plan.facts["wanted_tokens"] == 64  # inputs of the widest weight
    total = f"of {16 * blocks} tokens in {blocks - held_out} sequences to calibrate on"
    assert f"{total}; the widest weight wants 64" in str(plan)
    assert plan_compression(replace(small, tokens=70)).facts["tokens"] == 80  # whole sequences
    assert plan_compression(replace(small, samples=5)).facts["tokens"] == 80
    other = plan_compression(replace(small, eval_data=text))
    assert other.facts["tokens"] == 16 * blocks
    assert not Path(str(small.out)).exists()


def test_text_that_is_too_short_is_refused_with_what_it_has_and_what_is_wanted(small: CompressConfig) -> None:
    short = replace(small, tokens=32)
    with pytest.raises(InvalidOption, match=r"have 32 tokens, and its 64 inputs want"):
        _run(short)
    assert not Path(str(small.out)).exists()
    _run(replace(short, few_tokens="allow"))


def test_a_method_without_statistics_needs_no_text_and_one_with_them_says_so(
    small: CompressConfig, tmp_path: Path
) -> None:
    with pytest.raises(InvalidOption, match="svd-llm calibrates on text"):
        _run(replace(small, data=None))
    result = _run(replace(small, data=None, method="svd", out=str(tmp_path / "svd")))
    assert result["after"]["latency_seconds"] is None
    assert "similarity" not in result
    assert result["parameters_ratio"] < 0.8


def test_options_reach_the_method_and_the_share(small: CompressConfig) -> None:
    _run(replace(small, set={"compress.damping": 0.5, "share.relative": False}, share="error"))
    report = json.loads((Path(str(small.out)) / "report.json").read_text())
    assert report["options"]["damping"] == 0.5
    assert len({row["rank"] for row in report["rows"] if row["shape"] == [32, 32]}) > 1  # not uniform
    with pytest.raises(RankfoldError, match="did you mean damping"):
        plan_compression(replace(small, set={"compress.dampnig": 0.5}))
    with pytest.raises(InvalidOption, match="an option of no axis here"):
        replace(small, set={"structure.alpha": 1})


def test_the_precision_of_the_result_is_that_of_the_model(small: CompressConfig, tmp_path: Path) -> None:
    result = _run(replace(small, dtype="bfloat16"))
    assert result["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in _tensors(small.out).values()} == {torch.bfloat16}
    model, _ = load_finished(str(small.out))
    assert model.dtype == torch.bfloat16


def test_a_compressed_model_is_not_compressed_again_but_folded_first(
    small: CompressConfig, tmp_path: Path
) -> None:
    _run(small)
    again = replace(small, model=str(small.out), out=str(tmp_path / "again"))
    with pytest.raises(Incompatible, match="compressed already"):
        _run(again)


def _damaged(source: str, folder: Path, act: Callable[[dict[str, torch.Tensor]], object]) -> str:
    """Copy a model and change its weights."""
    for file in Path(source).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    act(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_a_weight_that_is_not_a_number_is_named_and_a_corrupt_file_is_one_sentence(
    small: CompressConfig, tmp_path: Path
) -> None:
    path = "model.layers.1.mlp.down_proj"
    (tmp_path / "nan").mkdir()
    bad = _damaged(
        small.model, tmp_path / "nan", lambda tensors: tensors[f"{path}.weight"][0].fill_(float("nan"))
    )
    with pytest.raises(RankfoldError, match=path):
        _run(replace(small, model=bad, few_tokens="allow"))
    file = tmp_path / "nan" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(FormatError, match="cannot be loaded"):
        _run(replace(small, model=bad), overwrite=True)


def test_a_picture_shows_every_spectrum_with_its_cut(small: CompressConfig, monkeypatch: Any) -> None:
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    usual = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), usual(self, *args, **kwargs))
    )
    _run(small)
    assert (Path(str(small.out)) / "spectra.png").stat().st_size > 10_000
    [figure] = drawn
    [axes] = figure.axes
    _, spectra, cuts = axes.collections
    assert len(axes.texts) == len(spectra.get_segments()) == len(cuts.get_segments()) == 14
    assert axes.texts[0].get_text() == "0.self_attn.q_proj\nrank 9 of 32"
    points = spectra.get_segments()[0]
    assert len(points) == 32
    assert points[0, 1] == 1  # the largest, at the top of its panel
    assert cuts.get_segments()[0][0, 0] == pytest.approx(points[8, 0])  # at the ninth


def test_without_matplotlib_one_sentence_says_what_is_missing(
    small: CompressConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    usual = importlib.util.find_spec

    def found(name: str) -> Any:
        return None if name == "matplotlib" else usual(name)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    _run(small, notify=said.append)
    assert said[-1] == "no picture of the spectra was drawn: pip install 'rankfold[plots]'"
    assert not (Path(str(small.out)) / "spectra.png").exists()


def test_a_model_of_any_class_loads_as_it_was_saved(bert: str, llama: str) -> None:
    model, fresh = load_as_saved(bert)
    assert (type(model).__name__, fresh) == ("BertModel", ())
    assert type(load_as_saved(llama, "bfloat16")[0]).__name__ == "LlamaForCausalLM"


class _Peak(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and the most that there were."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.most = 0
        for parameter in model.parameters():
            self._meet(parameter.untyped_storage())
        self.begin = self.now

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._meet(leaf.untyped_storage())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


@pytest.mark.parametrize("way", [{"memory": 2 * 8 * 64.0**2}, {"calibration": "sequential"}])
def test_the_peak_above_the_model_does_not_grow_with_its_depth(way: dict[str, Any], tmp_path: Path) -> None:
    above = {}
    for depth in (3, 12):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(depth)))
        data = [torch.randn(80, 64)]
        gc.collect()
        with _Peak(model) as peak:
            rf.compress(
                model, "svd-llm", keep=0.7, data=data, targets=["*"], progress=False,
                folder=tmp_path / str(depth), **way,
            )  # fmt: skip
        above[depth] = peak.most - peak.begin
        assert peak.now < 1.3 * peak.begin
    assert above[12] < 1.05 * above[3]


def test_blocks_are_taken_out(small: CompressConfig) -> None:
    options = {"compress.epochs": 0}
    facts = _run(replace(small, method="fusegpt", keep=0.5, form="dense", set=options))
    model = AutoModelForCausalLM.from_pretrained(str(small.out))
    assert model.config.num_hidden_layers == 1
    assert facts["weights"] == 2


def test_stock_layers_without_a_product_are_dense(small: CompressConfig) -> None:
    options = {"compress.levels": 2}
    facts = _run(replace(small, method="layer-adaptive-pruning", keep=0.7, form="layers", set=options))
    assert facts["form"] == "dense"
    assert "trust_remote_code" not in facts["loads_with"]
    AutoModelForCausalLM.from_pretrained(str(small.out))


def test_what_is_refused_before_a_weight_is_solved_leaves_nothing(small: CompressConfig) -> None:
    with pytest.raises(InvalidOption, match="energy"):
        _run(replace(small, share="energy"))  # which takes no keep
    assert not Path(str(small.out)).exists()


def test_a_refusal_does_not_cost_what_was_to_be_overwritten(small: CompressConfig) -> None:
    _run(small)
    before = _tensors(small.out)
    for wrong in ({"share": "unifrom"}, {"targets": ("embeddings",)}):
        with pytest.raises(RankfoldError):
            _run(replace(small, **wrong), overwrite=True)  # type: ignore[arg-type]
    assert _tensors(small.out).keys() == before.keys()
