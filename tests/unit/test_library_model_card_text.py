"""Model cards: what the hub's own reader makes of them, and whether they are true to the record."""

import re

import pytest
import yaml
from huggingface_hub import ModelCard

from haori.core.records import (
    AdapterCard,
    BaseReference,
    Check,
    Combination,
    DataReference,
    Evaluation,
    Fingerprint,
    Head,
    Metric,
    RunRecord,
    Verification,
)  # fmt: skip
from haori.library import Library
from haori.library.model_cards.reading import read_model_card
from haori.library.model_cards.text import render_model_card
from tests.command_line import haori
from tests.library_samples import stock_lora

PRINT = Fingerprint(architecture="LlamaForCausalLM", structure="s", weights="w")
BASE = BaseReference(name="SmolLM2", source="hub:HuggingFaceTB/SmolLM2-135M", components={"model": PRINT},
                     licence="Apache-2.0")  # fmt: skip


def data(source: str, licence: str | None = "MIT", **more) -> DataReference:
    return DataReference(source=source, hash="sha256:" + "d" * 64, format="messages", rows={"train": 1234},
                         licence=licence, **more)  # fmt: skip


def record(**fields) -> AdapterCard:
    plain = {"id": "sha256:" + "a" * 64, "origin": "trained", "created": "2026-01-02T00:00:00+00:00",
             "method": "lora", "base": BASE, "rank": 8, "alpha": 16.0}  # fmt: skip
    return AdapterCard(**{**plain, **fields})


@pytest.fixture
def full() -> AdapterCard:
    metrics = {
        "accuracy": Metric(value=0.75, low=0.7, high=0.8, base=0.5, difference=0.25, difference_low=0.2,
                           difference_high=0.3),
        "exact_match": Metric(value=float("nan")),
    }  # fmt: skip
    return record(
        data=(data("/home/me/reviews.jsonl", "CC-BY-4.0", attribution="Ada | Bob <b>"), data("stanfordnlp/imdb")),
        evaluations=(Evaluation(data=data("/home/me/test.jsonl"), metrics=metrics, time="2026-01-03T00:00:00+00:00",
                                notes=("12 rows were trained on.",)),),
        verification=Verification(passed=True, dtype="fp32", time="now",
                                  checks=(Check(name="finite", passed=True, detail="all | finite"),)),
        run=RunRecord(name="r", status="finished", started="now", steps=42, seconds=3.0, diagnosis=("It over-fits.",)),
        recipe={"training": {"epochs": 3}, "optimizer": {"lr": 0.0002}, "data": {"system": "Be kind."}},
        versions={"peft": "0.21.2"}, description="My own words:\n\n* first *", tags=("support",),
    )  # fmt: skip


def test_the_hub_reads_base_licence_data_and_results_back(full, tmp_path):
    (tmp_path / "README.md").write_text(render_model_card("support@3", full))
    read = ModelCard.load(tmp_path / "README.md").data
    assert read.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert read.library_name == "peft"
    assert read.pipeline_tag == "text-generation"
    assert read.datasets == ["stanfordnlp/imdb"]
    assert read.metrics == ["accuracy", "exact_match"]
    assert {"lora", "support", "base_model:adapter:HuggingFaceTB/SmolLM2-135M"} <= set(read.tags)
    assert read.to_dict()["base_model_relation"] == "adapter"
    assert read.model_name == "support"
    (result,) = read.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.75, "test.jsonl")
    assert result.task_type == "text-generation"
    assert read.license == "other"
    assert read.license_name == "Apache-2.0 AND CC-BY-4.0 AND MIT"
    assert read_model_card(tmp_path).licence == read.license_name  # and is read as that when it is added again


def test_the_text_says_what_the_record_says(full):
    text = render_model_card("support@3", full)
    assert "My own words:\n\n* first *" in text
    assert "| accuracy | 0.75 [0.7, 0.8] | 0.5 | 0.25 [0.2, 0.3] |" in text
    assert "| exact match | nan |" in text
    assert "12 rows were trained on." in text
    assert "| finite | passed | all \\| finite |" in text
    assert "42 optimizer steps" in text
    assert "epochs 3" in text
    assert "learning rate 0.0002" in text
    assert "> Be kind." in text
    assert "It over-fits." in text
    assert "| reviews.jsonl | 1,234 train | CC-BY-4.0 | Ada \\| Bob &lt;b> | dddddddddddd |" in text
    assert "https://creativecommons.org/licenses/by/4.0/" in text
    assert "/home/me" not in text
    assert re.search(r"^├── base SmolLM2 \(hub:HuggingFaceTB/SmolLM2-135M\)", text, re.M)


@pytest.mark.parametrize(
    ("licence", "datasets", "front"),
    [
        ("Apache-2.0", ["Apache-2.0"], {"license": "apache-2.0"}),
        ("GPL-3.0-or-later", [], {"license": "gpl-3.0"}),
        ("llama3.1", [], {"license": "llama3.1"}),
        (None, [], {"license": "unknown"}),
        ("MIT OR CC-BY-NC-4.0", [], {"license": "mit"}),
        ("flux-1-dev-non-commercial-license", [], {"license": "other", "license_name": "LicenseRef-scancode-flux-1-nc",
                                                   "license_link": "ATTRIBUTION.md"}),
    ],
)  # fmt: skip
def test_licences_have_the_hubs_names_where_it_has_one(licence, datasets, front):
    base = BASE.with_fields(licence=licence)
    text = render_model_card("a@1", record(base=base, data=tuple(data("d.jsonl", one) for one in datasets)))
    found = yaml.safe_load(text.split("---\n")[1])
    assert {key: value for key, value in found.items() if key.startswith("license")} == front


def test_an_adapter_of_images_has_a_prompt_and_a_pipeline():
    family = BaseReference(name="sdxl", source="family:sdxl", components={}, family="sdxl")
    text = render_model_card("style@1", record(base=family, components=("unet",), trigger_words=("ohwx dog", 'a "b"'),
                                        origin="added", stated_bases=("stabilityai/sdxl",)))  # fmt: skip
    found = yaml.safe_load(text.split("---\n")[1])
    assert found["instance_prompt"] == 'ohwx dog, a "b"'
    assert (found["library_name"], found["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert found["base_model"] == "stabilityai/sdxl"
    plain = render_model_card("style@1", record(base=family, components=("unet",), origin="added"))
    assert "base_model" not in yaml.safe_load(plain.split("---\n")[1])  # the name of a family is no repository
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "load_lora_weights" in code


def test_code_takes_the_template_that_lies_beside_the_adapter():
    assert "chat_template" not in render_model_card("a@1", record())
    text = render_model_card("a@1", record(), has_template=True)
    assert 'tokenizer.chat_template = open("path/to/this/folder/chat_template.jinja"' in text


def test_a_classifier_names_its_labels():
    head = Head(kind="sequence_classification", labels=("good", "bad", "so-so"))
    text = render_model_card("c@1", record(head=head, task="classification"))
    assert yaml.safe_load(text.split("---\n")[1])["pipeline_tag"] == "text-classification"
    assert "num_labels=3" in text
    assert "good, bad, so-so" in text


def test_a_folder_loses_its_path_and_is_no_dataset_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "data" / "rows").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    base = BASE.with_fields(name="/srv/my models/base", source="folder:/srv/my models/base")
    text = render_model_card("a@1", record(base=base, data=(data("data/rows"), data("data/rows.jsonl"))))
    found = yaml.safe_load(text.split("---\n")[1])
    assert "datasets" not in found
    assert found["base_model"] == "base"
    assert "/srv" not in text


def test_what_an_author_wrote_stays_and_forms_left_empty_do_not(full):
    added = record(origin="added", licence="MIT")
    text = render_model_card("a@1", added, of_author="---\nlicense: mit\n---\n# Mine\n\nUse **me** | <i>\n")
    assert text.endswith("## The author's own card\n\n# Mine\n\nUse **me** | <i>\n")
    assert text.count("\n---\n") == 1
    form = "# Model Card for Model ID\n" + "[More Information Needed]\n" * 30
    assert "More Information" not in render_model_card("a@1", added, of_author=form)
    assert render_model_card("a@1", added, of_author=text) == render_model_card(
        "a@1", added
    )  # not one inside the other
    assert "Mine" not in render_model_card("a@1", full, of_author="# Mine")


def test_an_export_has_a_card_whose_code_runs(capsys, haori_home, tiny_base_folder, tmp_path):
    folder = stock_lora(tiny_base_folder, tmp_path / "adapter")
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\ntags: [mine]\n---\nFrom its author.\n")
    done = haori(capsys, "library", "add", folder, "--base", tiny_base_folder, "--name", "a")
    assert done.code == 0, done.err
    done = haori(capsys, "library", "export", "a", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "commercial use: no" in done.out
    text = (tmp_path / "out" / "README.md").read_text()
    assert haori(capsys, "library", "model-card", "a").out == text
    assert "From its author." in text
    assert str(tmp_path) not in text and str(tiny_base_folder) not in text
    assert "CC-BY-NC-4.0" in (tmp_path / "out" / "ATTRIBUTION.md").read_text()
    assert (Library().get("a").path / "README.md").read_text().endswith("From its author.\n")
    code = text.split("```python\n")[1].split("```")[0]
    code = code.replace("path/to/this/folder", str(tmp_path / "out")).replace(
        f'"{tiny_base_folder.name}"', f'"{tiny_base_folder}"'
    )
    scope: dict = {}
    exec(code, scope)
    assert scope["model"].peft_config["default"].r == 4


def test_an_adapter_made_of_others_says_how():
    one, other = "sha256:" + "1" * 64, "sha256:" + "2" * 64
    made = Combination(kind="blend", weights={one: 0.4, other: 0.6}, energy=0.9876)
    text = render_model_card("ab@1", record(origin="combined", parents=(one, other), combination=made))
    assert "made by blend of 0.4 x 111111111111 + 0.6 x 222222222222; 98.76% of" in text
    extracted = Combination(kind="extract", tuned="/home/me/tuned")
    text = render_model_card("x@1", record(origin="added", licence="MIT", combination=extracted))
    assert "made by extract of tuned;" in text
    assert "/home/me" not in text
