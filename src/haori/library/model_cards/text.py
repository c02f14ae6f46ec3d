"""Writes an adapter's model card: a README.md as the model hub shows it, made from the record alone.

Nothing in it is typed in by hand but the description, which is kept as it is; the card that an author wrote for an
adapter from elsewhere follows at the end. Names of folders on this machine do not occur.
"""

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from haori.core.hashing import short
from haori.core.records import AdapterCard, DataReference, Evaluation, Metric, Verification
from haori.core.storage import write_text
from haori.library.adapter_files import CONFIG_NAME
from haori.library.formats.peft_components import component_folders
from haori.library.licences.attribution import attribution_text, public_card, public_verdict
from haori.library.licences.verdict import LicenceVerdict, Question
from haori.library.lineage import ancestors, lineage_tree
from haori.library.model_cards.fields import ATTRIBUTION_NAME, base_on_hub, card_fields, is_image

if TYPE_CHECKING:
    from haori.library.store import StoredAdapter

__all__ = ["MODEL_CARD_NAME", "model_card_of", "render_model_card", "write_model_card"]

MODEL_CARD_NAME = "README.md"

_MADE_BY = "<!-- Written by Haori from the adapter's record. -->"
_CLASSES = {"sequence_classification": "SequenceClassification", "token_classification": "TokenClassification"}
_SETTINGS = {
    "optimizer.lr": "learning rate", "schedule.kind": "schedule", "training.epochs": "epochs",
    "training.batch_tokens": "tokens per batch", "training.batch_rows": "rows per batch",
    "data.max_length": "longest row in tokens", "training.dtype": "computed in",
}  # fmt: skip
_TEMPLATE_NAME = "chat_template.jinja"


def write_model_card(stored: "StoredAdapter", folder: Path) -> None:
    """Write README.md and the text of credit into the folder that an adapter was exported to."""
    write_text(folder / MODEL_CARD_NAME, model_card_of(stored, peft=_peft_folders(stored.card, folder)))
    write_text(folder / ATTRIBUTION_NAME, attribution_text(stored.name, stored.card, ancestors(stored)))


def _peft_folders(card: AdapterCard, folder: Path) -> dict[str, str]:
    """Return where PEFT's folders of the components of a pipeline are in a folder; none where it holds other files."""
    if not is_image(card):
        return {}
    if (folder / CONFIG_NAME).is_file():
        return {card.components[0]: ""}
    return {component: f"/{component}" for component in component_folders(folder)}


def model_card_of(stored: "StoredAdapter", *, peft: Mapping[str, str] | None = None) -> str:
    """Return the model card of an adapter in the library, as exports hold it.

    Args:
        stored: The adapter.
        peft: Of an export of a pipeline's adapter for PEFT, where the folder of each component is in it.
    """
    given = stored.path / MODEL_CARD_NAME
    of_author = given.read_text(encoding="utf-8", errors="replace") if given.is_file() else ""
    has_template = (stored.path / _TEMPLATE_NAME).is_file()
    before = ancestors(stored)
    return render_model_card(
        stored.name, stored.card, before, of_author=of_author, has_template=has_template, peft=peft
    )


def render_model_card(
    name: str,
    card: AdapterCard,
    ancestors: Iterable[AdapterCard] = (),
    *,
    of_author: str = "",
    has_template: bool = False,
    peft: Mapping[str, str] | None = None,
) -> str:
    """Return the model card of an adapter, as Markdown with YAML front matter.

    Args:
        name: Its name in the library.
        card: Its card.
        ancestors: Cards of the adapters it was made from, as for `effective_licence`.
        of_author: The model card that came with the adapter, if one did.
        has_template: A chat template of its own lies beside it.
        peft: As for `model_card_of`.
    """
    before = [public_card(each) for each in ancestors]
    card = public_card(card)
    verdict = public_verdict(card, before)
    front = yaml.safe_dump(card_fields(name, card, verdict), sort_keys=False, allow_unicode=True, width=1000)
    sections: list[tuple[str, Iterable[str]]] = [
        ("", [f"# {name.partition('@')[0]}", "", *([card.description, ""] if card.description else []), _what(card)]),
        ("How to use it", _usage(card, has_template, peft or {})),
        ("Training", _training(card)),
        ("Evaluation", _evaluations(card.evaluations)),
        ("Proof", _proof(card.verification)),
        ("Licence", _licence(verdict)),
        ("Credit", attribution_text(name, card, before).splitlines()[2:]),
        ("Lineage", ["```text", *_tree(name, card, before), "```"]),
        ("Limits", _limits(card)),
        ("The author's own card", _of_author(card, of_author)),
    ]
    body: list[str] = []
    for title, found in sections:
        if lines := list(found):
            body += [*((f"## {title}", "") if title else ()), *_below(lines), ""]
    return f"---\n{front}---\n\n{_MADE_BY}\n\n" + "\n".join(body).rstrip() + "\n"


def _below(lines: Sequence[str]) -> tuple[str, ...]:
    """Return lines of a section with the headings inside it one level down."""
    return tuple(f"#{line}" if line.startswith("## ") else line for line in lines)


def _what(card: AdapterCard) -> str:
    size = ", ".join(f"{what} {value:g}" for what, value in (("rank", card.rank), ("alpha", card.alpha)) if value)
    method = (card.method_kind or card.method).replace("_", " ")
    made = card.combination
    if made is not None:
        of = " + ".join(f"{weight:g} x {short(identity)}" for identity, weight in made.weights.items())
        how = "" if made.method == "linear" else f" by {made.method}"
        return (
            f"An adapter ({method}{', ' + size if size else ''}) for {card.base.name}, made by {made.kind}{how} of "
            f"{of or made.tuned}; {made.energy:.2%} of the squared norm of the changes is kept."
        )
    trained = f", trained on {', '.join(data.source for data in card.data)}" if card.data else ""
    labels = f" It answers with one of the labels {', '.join(card.head.labels)}." if card.head is not None else ""
    return f"An adapter ({method}{', ' + size if size else ''}) for {card.base.name}{trained}.{labels}"


def _usage(card: AdapterCard, has_template: bool, peft: Mapping[str, str]) -> Iterator[str]:
    base = base_on_hub(card) or "path/to/the/base"
    yield "```python"
    if is_image(card):
        yield from ("from diffusers import DiffusionPipeline", *(["from peft import PeftModel"] if peft else []), "")
        yield f'pipeline = DiffusionPipeline.from_pretrained("{base}")'
        for component, place in peft.items():
            yield f'PeftModel.from_pretrained(pipeline.{component}, "path/to/this/folder{place}")'
        if not peft:
            yield 'pipeline.load_lora_weights("path/to/this/folder")'
        prompt = ", ".join(card.trigger_words) or "a photo"
        yield f"image = pipeline({prompt!r}).images[0]"
    else:
        kind = "CausalLM" if card.head is None else _CLASSES[card.head.kind]
        labels = "" if card.head is None else f", num_labels={len(card.head.labels)}"
        yield from ("from peft import PeftModel", f"from transformers import AutoModelFor{kind}, AutoTokenizer", "")
        yield f'base = AutoModelFor{kind}.from_pretrained("{base}"{labels})'
        yield 'model = PeftModel.from_pretrained(base, "path/to/this/folder")'
        yield f'tokenizer = AutoTokenizer.from_pretrained("{base}")'
        if has_template:
            yield f'tokenizer.chat_template = open("path/to/this/folder/{_TEMPLATE_NAME}", encoding="utf-8").read()'
    yield "```"
    if card.trigger_words:
        yield from ("", f"Words that call up what was learnt: {', '.join(f'`{word}`' for word in card.trigger_words)}.")
    if card.recommended_strength is not None:
        yield from ("", f"Recommended strength: {card.recommended_strength:g}.")
    if card.system is not None:
        yield from (
            "",
            "It was trained with this system message:",
            "",
            *(f"> {line}" for line in card.system.splitlines()),
        )


def _training(card: AdapterCard) -> Iterator[str]:
    if card.data:
        yield from _table(("data", "rows", "licence", "credit", "content"), (_data(data) for data in card.data))
    facts = []
    if card.run is not None:
        facts.append(f"{card.run.steps:,} optimizer steps in {card.run.seconds:,.0f} s")
    facts += [f"{title} {value}" for title, value in _settings(card)]
    if card.seed is not None:
        facts.append(f"seed {card.seed}")
    if card.versions:
        facts.append("made with " + ", ".join(f"{package} {number}" for package, number in card.versions.items()))
    if facts:
        yield from ("", f"{'; '.join(facts)}.")


def _settings(card: AdapterCard) -> Iterator[tuple[str, object]]:
    for key, title in _SETTINGS.items():
        section, _, field = key.partition(".")
        of_section = (card.recipe_data or {}).get(section)
        value = of_section.get(field) if isinstance(of_section, dict) else None
        if isinstance(value, str | int | float):
            yield title, value


def _data(data: DataReference) -> tuple[str, ...]:
    rows = ", ".join(f"{count:,} {split}" for split, count in data.rows.items())
    return (
        data.source,
        rows,
        data.licence or "not stated",
        data.attribution or "",
        data.hash.removeprefix("sha256:")[:12],
    )


def _evaluations(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    for evaluation in evaluations:
        rows = sum(evaluation.data.rows.values())
        yield from (f"On {evaluation.data.source} ({rows:,} rows, {evaluation.time[:10]}), with 95% intervals:", "")
        titles = ("metric", "adapter", "base", "difference")
        yield from _table(titles, (_metric(name, metric) for name, metric in evaluation.metrics.items()))
        yield from ("", *(f"- {note}" for note in evaluation.notes), "")


def _metric(name: str, metric: Metric) -> tuple[str, ...]:
    difference = _figure(metric.difference, metric.difference_low, metric.difference_high)
    return name.replace("_", " "), _figure(metric.value, metric.low, metric.high), _figure(metric.base), difference


def _figure(value: float | None, low: float | None = None, high: float | None = None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if low is None or high is None else f"{value:.4g} [{low:.4g}, {high:.4g}]"


def _proof(verification: Verification | None) -> Iterator[str]:
    if verification is None:
        return
    outcome = "passed" if verification.passed else "failed"
    yield from (f"The saved files were loaded anew and {outcome} these checks ({verification.dtype}):", "")
    yield from _table(
        ("check", "", "found"),
        ((check.name, "passed" if check.passed else "failed", check.detail) for check in verification.checks),
    )


def _licence(verdict: LicenceVerdict) -> Iterator[str]:
    yield from (f"`{verdict.expression}`", "")
    asked: dict[str, Question] = {"commercial use": "commercial", "sharing": "redistribution", "credit": "credit"}
    rows = ((title, getattr(verdict, of), " ".join(verdict.because(of))) for title, of in asked.items())
    yield from _table(("question", "answer", "because"), rows)
    yield from ("", "This follows from the licences of what the adapter was made from; it is not legal advice.")


def _tree(name: str, card: AdapterCard, before: Iterable[AdapterCard]) -> list[str]:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=1000, color_system=None)
    console.print(lineage_tree(name, card, before))
    return [line.rstrip().replace("```", "'''") for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def _limits(card: AdapterCard) -> Iterator[str]:
    if not card.evaluations:
        yield "- It was not measured on any data."
    if not card.base.components:
        yield f"- Of its base only the family is known ({card.base.family})."
    else:
        prints = ", ".join(f"{name} {of.id}" for name, of in card.base.components.items() if name in card.components)
        yield f"- The figures hold on this base alone, by the fingerprint of its weights: {prints}."
    if card.run is not None:
        yield from (f"- {said}" for said in card.run.diagnosis)


def _of_author(card: AdapterCard, text: str) -> Iterator[str]:
    """Yield what the author of an adapter from elsewhere wrote, without front matter; PEFT's empty form is nothing."""
    body = re.sub(r"\A﻿?---\s*\n.*?\n---\s*\n", "", text, flags=re.DOTALL).strip()
    empty = body.startswith("# Model Card for Model ID") and body.count("[More Information Needed]") > 20
    if card.origin == "added" and body and not empty and _MADE_BY not in text:
        yield from body.splitlines()


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"
    for row in rows:
        yield f"| {' | '.join(_cell(value) for value in row)} |"


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|").replace("<", "&lt;")
