"""The terminal, an evaluation and a merge speak to an adapter as it was trained."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from haori.bases import find_base
from haori.data import template_hash
from haori.data.section import TextSection
from haori.evaluation import evaluate_stored
from haori.library import Library, merge_stored, open_adapter
from haori.tasks.examination import MeasureOptions
from tests.integration.test_serve_prompts import HELLO, OWN, POLITE, stock_ids
from tests.library_samples import card_of, stock_lora


@pytest.fixture
def own(haori_home: Path, tiny_base_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> Any:
    """The tokenizer that the library's adapter `poet` was trained with."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = OWN
    folder = stock_lora(tiny_base_folder, tmp_path / "made")
    (folder / "chat_template.jinja").write_text(OWN)
    recipe = {"name": "poet", "base": "tiny", "data": {"path": "x", "system": "Be polite."}}
    reference = find_base(str(tiny_base_folder)).reference()
    Library().add(folder, "poet", card_of(folder, reference, recipe=recipe, template_hash=template_hash(tokenizer)))
    return tokenizer


def test_an_opened_adapter_is_asked_as_it_was_trained(own: Any):
    opened = open_adapter("poet")
    assert opened.prompts.prompt(HELLO) == stock_ids(own, [POLITE, *HELLO])
    assert opened.tokenizer.chat_template == OWN


def test_an_evaluation_asks_as_in_training_and_says_so(own: Any, tmp_path: Path):
    rows = [{"messages": [*HELLO, {"role": "assistant", "content": f"answer {i}"}]} for i in range(4)]
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result, _ = evaluate_stored(
        "poet", TextSection(path=str(data)), options=MeasureOptions(max_new_tokens=2), samples=0, against_base=False
    )
    assert any("Rows without a system message got the one trained with: 4" in note for note in result.notes)


def test_a_merged_model_brings_the_template_along(own: Any, tmp_path: Path):
    merged = AutoTokenizer.from_pretrained(merge_stored("poet", tmp_path / "merged"))
    assert stock_ids(merged, HELLO) == stock_ids(own, HELLO)
