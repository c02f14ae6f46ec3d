"""`haori blend --search`: the weights found are a minimum, and the figures are those of the stored adapters."""

import json
import math
from pathlib import Path

import pytest

from haori.bases import find_base
from haori.data.section import TextSection
from haori.evaluation import evaluate_stored
from haori.evaluation.blend_search import descend, search_weights
from haori.library import Library, import_adapter
from haori.tasks.examination import MeasureOptions
from tests.command_line import haori
from tests.library_samples import stock_lora


def test_the_search_finds_the_minimum_of_a_bowl() -> None:
    looked: list[tuple[float, ...]] = []

    def bowl(weights: tuple[float, ...]) -> float:
        looked.append(weights)
        x, y, z = weights
        return (x - 0.45) ** 2 + 2 * (y - 1.1) ** 2 + (z - 0.0) ** 2 + 0.3 * (x - 0.45) * (y - 1.1)

    found = descend(bowl, 3, 200)
    assert found == pytest.approx((0.45, 1.1, 0.0), abs=0.05)
    assert len(looked) == len(set(looked)), "nothing is measured twice"
    looked.clear()
    descend(bowl, 3, 12)
    assert len(looked) == 12


def skill(path: Path, answers: list[str]) -> Path:
    rows = [{"prompt": f"question {number}", "completion": answer} for number, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def library(tiny_base_folder: Path, tmp_path: Path) -> Library:
    base = find_base(str(tiny_base_folder))
    for seed, name in enumerate(("a", "b")):
        folder = stock_lora(tiny_base_folder, tmp_path / name, seed=seed, target_modules=["q_proj", "down_proj"])
        import_adapter(folder, base, name=name)
    return Library()


def perplexity(name: str, data: Path) -> float:
    options = MeasureOptions(labels="none", metrics=("perplexity",))
    result, _ = evaluate_stored(name, TextSection(path=str(data)), options=options, against_base=False, samples=0)
    return result.metrics["perplexity"].value


def test_figures_are_those_of_the_stored_adapters(
    library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        skill(tmp_path / "yes.jsonl", ["positive review", "answer the question", "user"]),
        skill(tmp_path / "no.jsonl", ["negative", "system is this"]),
    ]
    arguments = [part for file in files for part in ("--search", file)]
    done = haori(capsys, "blend", "a", "b", "--name", "ab", *arguments)
    assert done.code == 0, done.err
    stored = library.get("ab") if "stays as it is" not in done.out else None
    found = search_weights(["a", "b"], [str(file) for file in files])
    assert stored is None or stored.card.combination is not None
    by_file = {Path(one.name).name: one for one in found.skills}
    for file in files:
        one = by_file[file.name]
        assert one.metric == "perplexity"
        assert one.alone == pytest.approx([perplexity("a", file), perplexity("b", file)], rel=1e-4)
        assert one.blend == pytest.approx(perplexity("ab", file), rel=1e-4)
        assert f"{one.blend:.4g}" in done.out
    mean = sum(math.log(one.blend) for one in found.skills) / 2
    for at in range(2):
        assert mean <= sum(math.log(one.alone[at]) for one in found.skills) / 2 + 1e-6
    weights = [weight for _, weight in found.parts]
    if stored is not None and stored.card.combination is not None:
        assert list(stored.card.combination.weights.values()) == [weight for weight in weights if weight]


@pytest.mark.parametrize(("arguments", "said"), [
    (["a"], "two adapters or more"), (["a:0.4", "b"], "without weights"), (["a", "b", "--method", "ties"], "linear"),
])  # fmt: skip
def test_what_cannot_be_searched_is_refused(
    library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    data = skill(tmp_path / "yes.jsonl", ["positive"])
    done = haori(capsys, "blend", *arguments, "--name", "ab", "--search", data)
    assert done.code == 2
    assert said in done.err
