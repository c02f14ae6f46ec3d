"""What a base does is known by the name that transformers gives its architecture."""

import dataclasses

import pytest
from transformers.models.auto import modeling_auto

from haori.bases import Base, continues_text, writes_text
from tests.server_samples import sample_base


def base_of(architecture: str) -> Base:
    base = sample_base()
    part = base.components["model"]
    fingerprint = part.fingerprint.with_fields(architecture=architecture)
    return dataclasses.replace(base, components={"model": dataclasses.replace(part, fingerprint=fingerprint)})


@pytest.mark.parametrize(
    ("architecture", "writes", "continues"),
    [
        ("LlamaForCausalLM", True, True),
        ("GPT2LMHeadModel", True, True),
        ("T5ForConditionalGeneration", True, False),
        ("BertModel", False, False),
        ("BertForMaskedLM", False, False),
        ("RobertaForSequenceClassification", False, False),
        ("LlamaForSequenceClassification", False, False),
    ],
)
def test_what_writes_text(architecture: str, writes: bool, continues: bool):
    base = base_of(architecture)
    assert (writes_text(base), continues_text(base)) == (writes, continues)


def test_no_encoder_of_transformers_is_taken_for_a_writer():
    names = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()
    assert [name for name in names if writes_text(base_of(name))] == []
