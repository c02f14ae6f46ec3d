"""Parts of a comparison without training: recipes, learning rates, scores, and how all of it is shown."""

import re
from io import StringIO
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from haori.core.errors import MismatchError, RecipeError
from haori.core.records import BaseReference, DataReference, Fingerprint
from haori.evaluation import Forgetting
from haori.evaluation.forgetting import Change
from haori.jobs import Comparison, show_comparison
from haori.jobs.compare.folder import RunOutcome
from haori.jobs.compare.rates import choose_rate
from haori.jobs.compare.recipes import adapt_recipe, check_methods, run_key, with_run
from haori.jobs.compare.records import Cost, Difference, Measured, MeasuredRow, MethodResult, Point, Rate, Score
from haori.jobs.compare.report import render_comparison
from haori.jobs.compare.scores import main_metric, scores_of
from haori.tasks.causal_lm import TASK
from haori.tasks.recipe import recipe_from

EVIL = "<script>alert('x')</script> [bold]&"


def recipe(**method):
    document = {"name": "n" * 100, "base": "b", "data": {"path": "c"}, "training": {"seed": 4}, "method": method}
    return recipe_from(document)


def test_a_recipe_keeps_what_the_other_method_knows_and_says_what_it_drops():
    given = recipe(kind="lora", rank=4, init="pissa", rslora=True, dropout=0.1, target=["q_proj"], layers=[0, 1])
    dora = adapt_recipe(given, "dora")
    assert dora.recipe.method.model_dump(exclude_defaults=True) == {
        "kind": "dora", "rank": 4, "rslora": True, "dropout": 0.1, "target": ("q_proj",), "layers": (0, 1),
    }  # fmt: skip
    assert dora.notes == ("dora is trained without method.init=pissa, which it does not know.",)
    assert dora.recipe.training == given.training
    qlora = adapt_recipe(given, "qlora")
    assert qlora.notes == ("qlora is trained without method.init=pissa, which it does not know.",), "known, not allowed"
    full = adapt_recipe(given, "full")
    assert full.recipe.method.kind == "full"
    assert len(full.notes) == 6
    assert adapt_recipe(given, "lora") == (given, ())
    assert adapt_recipe(recipe(kind="lora"), "full").notes == (), "defaults are not worth a word"


def test_a_learning_rate_is_not_carried_over_to_full_fine_tuning():
    given = recipe(kind="lora").model_copy(
        update={"optimizer": recipe(kind="lora").optimizer.model_copy(update={"lr": 1e-3})}
    )
    assert adapt_recipe(given, "dora").recipe.optimizer.lr == 1e-3
    full = adapt_recipe(given, "full")
    assert full.recipe.optimizer.lr == "auto"
    assert "optimizer.lr=0.001 was given for lora" in full.notes[-1]


def test_a_run_is_named_after_method_and_seed():
    run = with_run(recipe(kind="dora"), 7, 0.01)
    assert run.name == "n" * 88 + "-dora-seed-7"
    assert (run.training.seed, run.optimizer.lr) == (7, 0.01)
    assert with_run(recipe(kind="dora"), 7, None).optimizer.lr == "auto"
    assert (run_key("dora", None, 7), run_key("dora", 0.01, 7)) == ("dora-lr-auto-seed-7", "dora-lr-0.01-seed-7")


def test_methods_are_checked_and_the_base_is_no_method_to_train():
    assert check_methods(recipe(kind="lora"), ("base", "full", "lora")) == ("full", "lora")
    assert check_methods(recipe(kind="peft", type="IA3"), ("peft",)) == ("peft",)
    with pytest.raises(RecipeError, match="did you mean 'qlora'"):
        check_methods(recipe(kind="lora"), ("qlor",))


class Place:
    """Trains by formula: validation loss is the distance of log lr from the best rate's."""

    def __init__(self, best: float, failing: float = float("inf")) -> None:
        self.best, self.failing, self.deleted = best, failing, []

    def run(self, recipe, key, *, measure):
        assert not measure
        lr = 1e-3 if recipe.optimizer.lr == "auto" else recipe.optimizer.lr
        if lr > self.failing:
            return RunOutcome(None, None, "The loss became nan.")
        loss = abs(np.log(lr / self.best))
        return RunOutcome(SimpleNamespace(lr=lr, run=SimpleNamespace(validation_loss=loss)), None, None)

    def say(self, text):
        pass

    def forget_weights(self, trained):
        self.deleted.append(trained.lr)


@pytest.mark.parametrize(
    ("best", "tried", "chosen"),
    [
        (1e-3, [1e-3 / 3, 1e-3, 3e-3], None),
        (1e-2, [1e-3 / 3, 1e-3, 3e-3, 9e-3], 9e-3),
        (1e-4, [1e-3 / 9, 1e-3 / 3, 1e-3, 3e-3], 1e-3 / 9),
    ],
)
def test_rates_are_tried_around_the_automatic_one_and_beyond_the_better_end(best, tried, chosen):
    place = Place(best)
    choice = choose_rate(place, recipe(kind="lora"), 0)
    assert [rate.lr for rate in choice.rates] == pytest.approx(tried)
    assert choice.lr == (None if chosen is None else pytest.approx(chosen))
    assert len(place.deleted) == len(tried) - 1


def test_a_rate_that_fails_is_a_row_and_never_chosen():
    choice = choose_rate(Place(1.0, failing=2e-3), recipe(kind="lora"), 0)
    assert choice.lr is None
    assert [rate.error for rate in choice.rates] == [None, None, "The loss became nan."]
    nothing = choose_rate(Place(1.0, failing=0.0), recipe(kind="lora"), 0)
    assert (nothing.rates, nothing.error) == ((), "The loss became nan.")


def measured(labels: str, nll: float = 1.0) -> Measured:
    rows = tuple(
        MeasuredRow(origin=f"t:{n}", reference="ab"[n % 2], tokens=2, nll=nll, label=label, text=None)
        for n, label in enumerate(labels)
    )
    return Measured(rows=rows, labels=("a", "b"), notes=(), general={})


def test_scores_are_means_over_seeds_and_differences_are_paired():
    base, right, half = measured("aaaaaaaa"), measured("abababab"), measured("abababaa")
    score = scores_of(TASK, [right, half], {"base": [base]})["accuracy"]
    assert score.each == (1.0, 0.875)
    assert score.value == 0.9375
    assert score.spread == pytest.approx(0.0884, abs=1e-4)
    assert score.against["base"].value == 0.4375
    assert score.low <= score.value <= score.high
    same = scores_of(TASK, [base], {"base": [base]})["accuracy"]
    assert same.spread is None
    assert same.against["base"] == Difference(value=0.0, low=0.0, high=0.0)
    assert main_metric(scores_of(TASK, [base], {})) == "accuracy"


def test_runs_on_different_rows_are_not_compared():
    with pytest.raises(MismatchError, match="different rows"):
        scores_of(TASK, [measured("ab")], {"base": [measured("aba")]})


def score(value: float, **against: float) -> Score:
    differences = {name: Difference(value=value - other, low=-0.01, high=0.3) for name, other in against.items()}
    return Score(value=value, low=value - 0.1, high=value + 0.1, each=(value, value), spread=0.02, against=differences)


def result(method: str, accuracy: float, gigabytes: float, forgot: float, **fields) -> MethodResult:
    change = Change(before=3.0, after=3.0 + forgot, difference=forgot, low=forgot - 0.01, high=forgot + 0.01,
                    passages=9, tokens=90)  # fmt: skip
    points = tuple(Point(epoch=n / 2, step=n, loss=2.0 - n / 10 - gigabytes / 50) for n in range(4))
    return MethodResult(
        method=method, seeds=(0, 1), lr=1e-3, scores={"accuracy": score(accuracy, base=0.6, full=0.85)},
        cost=Cost(seconds=75.0, tokens=9e4, tokens_per_s=1200.0, peak_memory_bytes=int(gigabytes * 1e9),
                  trainable_parameters=10, total_parameters=1000, size_bytes=10**7, steps=20, epochs=2.0),
        forgetting={"shipped": Forgetting(whole=change, kinds={"code": change})}, curves=(points, points), **fields,
    )  # fmt: skip


def comparison(*methods: MethodResult) -> Comparison:
    fingerprint = Fingerprint(architecture="LlamaForCausalLM", structure="sha256:1", weights="sha256:2")
    data = DataReference(source=EVIL, hash="sha256:abcdef0123456789", format="messages", rows={})
    bare = MethodResult(method="base", seeds=(), scores={"accuracy": score(0.6)})
    return Comparison(
        name=EVIL, recipe=recipe(kind="lora"), seeds=(0, 1), base=BaseReference(
            name=EVIL, source=EVIL, fingerprint=fingerprint
        ), data=data, test=data, test_rows=100, methods=(bare, *methods), notes=(EVIL,), machine={"device": EVIL},
        time="2026-11-21T10:00:00+00:00",
    )  # fmt: skip


def shown(found: Comparison) -> str:
    stream = StringIO()
    show_comparison(found, Console(file=stream, width=120))
    return stream.getvalue()


def test_the_page_shows_every_method_and_trusts_no_text():
    rates = (Rate(lr=1e-3, validation_loss=1.5), Rate(lr=3e-3, validation_loss=None, error=EVIL))
    found = comparison(
        result("lora", 0.84, 1.5, 0.02, rates=rates), result("dora", 0.83, 1.5, 0.03), result("full", 0.85, 4.0, 0.3),
        MethodResult(method="qlora", seeds=(), errors=(EVIL,)),
    )  # fmt: skip
    page = render_comparison(found)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 8
    assert page.count("<svg") == 3
    assert page.count("<polyline") == 6
    assert "84.0%" in page
    assert "1.50 GB instead of 4.00 GB" in page
    assert "forgot +0.020 instead of +0.300 nats per token" in page
    names = re.findall(r'<text class="name" x="([\d.]+)" y="([-\d.]+)"', page)[:3]
    assert len(set(names)) == 3, "names of methods in one place do not cover one another"
    text = shown(found)
    assert "84.0% [74.0% to 94.0%]" in text or "84.0% [74.0 to 94.0]" in text
    assert f"QLoRA failed: {EVIL}" in text


def test_a_comparison_in_which_everything_failed_is_shown_too():
    found = comparison(MethodResult(method="lora", seeds=(), errors=("It broke.",)))
    found = found.with_fields(data=None)
    assert found.failed == ("lora",)
    page = render_comparison(found)
    assert "No adapter was trained to the end." in page
    assert "<svg" not in page
    assert "LoRA failed: It broke." in shown(found)


def test_a_comparison_reads_back_as_it_was_written():
    found = comparison(result("lora", 0.84, 1.5, 0.02))
    assert Comparison.model_validate_json(found.model_dump_json()) == found


def test_a_workspace_holds_library_and_runs_and_leaves_bases_at_home(haori_home, tmp_path, monkeypatch):
    from haori.core.settings import settings

    monkeypatch.setenv("HAORI_WORKSPACE", str(tmp_path / "apart"))
    settings.cache_clear()
    found = settings()
    assert (found.library, found.runs) == (tmp_path / "apart" / "library", tmp_path / "apart" / "runs")
    assert (found.bases, found.cache) == (haori_home / "bases", haori_home / "cache")
