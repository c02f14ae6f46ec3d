"""The demo: the whole way on real data and a real language model, with every claim measured as it goes.

Movie-review sentences rated by people; SmolLM2-135M-Instruct; 400 test rows that training never sees.
"""

import gc
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from haori.cli.console import results
from haori.core.errors import VerificationError
from haori.core.records import DataReference
from haori.core.settings import settings
from haori.data.section import TextSection
from haori.tasks.recipe import Recipe, recipe_from

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.data import Conversation
    from haori.evaluation import EvaluationResult
    from haori.training import TrainedRun

__all__ = ["run_demo", "train_shown"]

_BASE = "smollm2-135m-instruct"
_NAME = "movie-reviews"


def run_demo(rows: int) -> None:
    """Fetch, measure the base, train, prove, measure again, and say what to type next.

    Args:
        rows: Reviews to train on (a tenth of them is held out for validation).

    Raises:
        VerificationError: The figures contradict one another.
        HaoriError: Any step failed.
    """
    from haori.bases import find_base
    from haori.data import fetch_reviews, read_conversations
    from haori.data.reviews import ATTRIBUTION, LICENCE

    started = time.perf_counter()
    console = results()
    console.rule("1. A base model and data")
    base = find_base(_BASE)
    reviews = fetch_reviews()
    train, test = reviews.write(settings().home / "demo", train_rows=rows)
    console.print(f"{base.name}: {base.parameters / 1e6:.0f}M parameters, {base.licence}, fingerprint {base.id}")
    console.print(
        f"{rows} movie-review sentences to train on, {len(reviews.test)} to test on, rated by people ({LICENCE})"
    )
    if reviews.note:
        console.print(f"[yellow]{reviews.note}[/]")
    section = TextSection(path=str(test), licence=LICENCE, attribution=ATTRIBUTION)
    conversations, report = read_conversations(section)
    console.print(
        f"[dim]{conversations[0].messages[0]['content']}[/]\n[dim]-> {conversations[0].messages[1]['content']}[/]"
    )

    fetched = time.perf_counter()
    console.rule("2. What the base can do")
    before = _measure_base(base, conversations, report.reference())
    _print_scores(console, "base", before)

    console.rule("3. Training an adapter")
    run = train_shown(_recipe(train, LICENCE, ATTRIBUTION))
    assert run.adapter is not None

    console.rule("4. What the adapter can do")
    result, folder = _measure_adapter(run.adapter.name, conversations, report.reference())
    if result.metrics["accuracy"].base != before.metrics["accuracy"].value:
        raise VerificationError("The base alone and the base with its adapter switched off scored differently.")
    _print_result(console, result)

    console.rule("5. What it cost")
    _print_cost(console, base, run, fetched - started, time.perf_counter() - started)
    console.rule("Next")
    for command, what in (
        (f"haori chat {_NAME}", "talk to it; /base switches the adapter off"),
        (f"haori library show {_NAME}", "its card: base, data, licence, proof, scores"),
        ("haori data check my.jsonl --show 3", "look at data of your own"),
        (f"haori train --base {_BASE} --data my.jsonl --name mine", "and train on it"),
    ):
        console.print(f"  [bold]{command}[/]  [dim]{what}[/]", soft_wrap=True)
    console.print(f"Report: {folder / 'evaluation.html'}\nLoss plot: {run.folder / 'loss.png'}", soft_wrap=True)


def _recipe(train: Path, licence: str, attribution: str) -> Recipe:
    data = {"path": str(train), "licence": licence, "attribution": attribution}
    return recipe_from({"name": _NAME, "base": _BASE, "data": data, "training": {"epochs": 1}})


def _measure_base(base: "Base", conversations: "list[Conversation]", reference: DataReference) -> "EvaluationResult":
    from haori.bases import load_model, load_tokenizer
    from haori.evaluation import evaluate_adapter
    from haori.tasks.examination import MeasureOptions
    from haori.tasks.registry import task_of

    model = load_model(base)
    result = evaluate_adapter(
        task_of("causal_lm"),
        model,
        load_tokenizer(base),
        conversations,
        data_reference=reference,
        options=MeasureOptions(metrics=("label",)),
        against_base=False,
        samples=0,
        adapter=base.name,
    )
    del model
    gc.collect()
    return result


def train_shown(recipe: Recipe) -> "TrainedRun":
    """Train as `haori train` does, with everything that it prints."""
    from haori.cli.console import notes
    from haori.cli.training import show_choices, show_run
    from haori.training import TrainingDisplay, prepare, train_run

    prepared = prepare(recipe)
    show_choices(prepared)
    with TrainingDisplay(notes()) as display:
        run = train_run(recipe, on_event=display.update, prepared=prepared)
    show_run(run)
    return run


def _measure_adapter(
    name: str, conversations: "list[Conversation]", reference: DataReference
) -> "tuple[EvaluationResult, Path]":
    from haori.evaluation import evaluate_opened
    from haori.library import open_adapter
    from haori.tasks.examination import MeasureOptions

    options = MeasureOptions(metrics=("label",), max_new_tokens=8)
    return evaluate_opened(open_adapter(name), conversations, reference, options=options, samples=3)


def _print_scores(console: Console, who: str, result: "EvaluationResult") -> None:
    accuracy, f1 = result.metrics["accuracy"], result.metrics["macro_f1"]
    console.print(
        f"{who}: accuracy [bold]{accuracy.value:.1%}[/] [{accuracy.low:.1%}, {accuracy.high:.1%}], "
        f"macro-F1 [bold]{f1.value:.1%}[/] on {len(result.rows)} rows"
    )


def _print_result(console: Console, result: "EvaluationResult") -> None:
    from haori.evaluation import metrics_table, sample_panels

    console.print(metrics_table(result))
    accuracy = result.metrics["accuracy"]
    assert accuracy.difference is not None and accuracy.difference_low is not None
    assert accuracy.difference_high is not None
    console.print(
        f"The adapter is [bold]{100 * accuracy.difference:+.1f} points[/] of accuracy from its base, "
        f"95% interval [{100 * accuracy.difference_low:+.1f}, {100 * accuracy.difference_high:+.1f}] (paired)."
    )
    for panel in sample_panels(result):
        console.print(panel)


def _print_cost(console: Console, base: "Base", run: "TrainedRun", fetch_s: float, total_s: float) -> None:
    from rich.table import Table

    from haori.training import peak_memory_bytes

    assert run.adapter is not None
    card, record = run.adapter.card, run.record
    share = card.size_bytes / base.size_bytes
    table = Table(show_header=False)
    for row in (
        ("trained parameters", f"{record.trainable_parameters:,} of {record.total_parameters:,}"),
        ("adapter file", f"{card.size_bytes / 1e6:.1f} MB ({share:.1%} of the base's {base.size_bytes / 1e6:.0f} MB)"),
        (
            "training",
            f"{record.seconds:.0f} s for {record.cost:,} tokens ({record.cost / record.seconds:,.0f} tokens/s)",
        ),
        ("whole demo", f"{total_s:.0f} s, of which {fetch_s:.0f} s to fetch and convert the base"),
        ("peak memory", f"{peak_memory_bytes() / 1e9:.2f} GB"),
    ):
        table.add_row(*row)
    console.print(table)
