"""The whole evaluation on a real tiny Llama with real PEFT adapters."""

from dataclasses import fields

import pytest
import torch

from haori.core.errors import DataError, InputError, MismatchError
from haori.core.records import DataReference, Evaluation
from haori.data import Conversation
from haori.evaluation import evaluate_adapter
from haori.tasks.causal_lm import TASK
from haori.tasks.examination import MeasureOptions

REFERENCE = DataReference(source="test.jsonl", hash="sha256:" + "ab" * 32, format="messages", rows={"test": 12})


def load(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():  # random weights, but large: answers depend on the prompt and are far from uniform
        for layer in model.model.layers:
            for parameter in layer.parameters():
                parameter.mul_(12 if parameter.dim() == 2 else 1)
        model.model.norm.weight.mul_(8)
    return model


def adapted(folder, *, scale=1.0, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    model = get_peft_model(load(folder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5 * scale)
            elif parameter.requires_grad and "lora" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def asked(answer, n, question="Is review {n} good or bad?"):
    messages = ({"role": "user", "content": question.format(n=n)}, {"role": "assistant", "content": answer})
    return Conversation(messages=messages, origin=f"test.jsonl:{n}")


WORDS = ["sun", "rain", "a", "the", "of", "dog", "house", "river", "blue", "ice", "fire", "stone"]
# One token each: a random model prefers short labels.
LABELLED = [asked(("x", "y")[n % 2], n, f"{WORDS[n]} {WORDS[-n]}?") for n in range(12)]
FREE = [asked(f"The answer is {n}, as you can see", n, "What is {n}?") for n in range(8)]


def evaluate(model, tokenizer, rows, **options):
    settings = {"max_new_tokens": 5, "samples": 2} | options
    asked = {name: settings.pop(name) for name in [f.name for f in fields(MeasureOptions)] if name in settings}
    options = MeasureOptions(**asked)
    return evaluate_adapter(TASK, model, tokenizer, rows, data_reference=REFERENCE, options=options, **settings)


def test_label_task_is_found_and_measured(tiny_base_folder, tiny_tokenizer) -> None:
    result = evaluate(adapted(tiny_base_folder), tiny_tokenizer, LABELLED)
    assert result.labels == ("x", "y")
    assert set(result.metrics) == {"accuracy", "macro_f1", "micro_f1", "perplexity"}
    accuracy = result.metrics["accuracy"]
    right = [row.adapter.label == row.reference for row in result.rows]
    assert 0 < sum(right) < 12
    assert len({row.base.label for row in result.rows}) == 2
    assert accuracy.value == sum(right) / 12 == result.metrics["micro_f1"].value
    assert accuracy.difference == accuracy.value - accuracy.base
    assert accuracy.difference_low <= accuracy.difference <= accuracy.difference_high
    assert sum(map(sum, result.confusion.adapter)) == sum(map(sum, result.confusion.base)) == 12
    assert result.confusion.adapter[0][0] + result.confusion.adapter[1][1] == sum(right)
    notes = " ".join(result.notes)
    for words in ("Taken for a label task", "'x', 'y'", "McNemar", "2000 resamples", "Only 12 rows"):
        assert words in notes
    assert len(result.samples) == 2
    assert all(sample.adapter.text is not None and sample.base.label in result.labels for sample in result.samples)


def test_result_becomes_a_record(tiny_base_folder, tiny_tokenizer) -> None:
    result = evaluate(adapted(tiny_base_folder), tiny_tokenizer, LABELLED, samples=0)
    record = result.to_record()
    assert Evaluation.model_validate_json(record.model_dump_json()) == record
    assert record.against == "base"
    assert record.metrics == result.metrics
    assert result.samples == ()


def test_adapter_that_does_nothing_differs_by_nothing(tiny_base_folder, tiny_tokenizer) -> None:
    result = evaluate(adapted(tiny_base_folder, scale=0), tiny_tokenizer, LABELLED)
    for metric in result.metrics.values():
        assert (metric.difference, metric.difference_low, metric.difference_high) == (0, 0, 0)
    assert any("spread evenly over the 12 rows" in note for note in result.notes)


@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["norm"]}, {"trainable_token_indices": list(range(100, 200))}, {"use_dora": True}],
    ids=["lora", "modules_to_save", "trainable tokens", "dora"],
)
def test_base_is_the_bare_base(tiny_base_folder, tiny_tokenizer, options) -> None:
    result = evaluate(adapted(tiny_base_folder, **options), tiny_tokenizer, LABELLED, samples=0)
    bare = evaluate(load(tiny_base_folder), tiny_tokenizer, LABELLED, samples=0, against_base=False)
    assert result.metrics["perplexity"].base == pytest.approx(bare.metrics["perplexity"].value, rel=1e-6)
    assert [row.base.nll for row in result.rows] == pytest.approx([row.adapter.nll for row in bare.rows], rel=1e-5)
    assert [row.base.label for row in result.rows] == [row.adapter.label for row in bare.rows]
    assert result.metrics["perplexity"].value != pytest.approx(bare.metrics["perplexity"].value, rel=1e-3)
    assert bare.against is None and bare.rows[0].base is None and bare.metrics["perplexity"].base is None


@pytest.mark.parametrize(
    ("options", "why"), [({"bias": "lora_only"}, "bias='lora_only'"), ({"init_lora_weights": "pissa"}, "'pissa'")]
)
def test_adapter_that_changed_its_base_needs_the_base_itself(tiny_base_folder, tiny_tokenizer, options, why) -> None:
    model = adapted(tiny_base_folder, **options)
    with pytest.raises(MismatchError, match=why):
        evaluate(model, tiny_tokenizer, LABELLED)
    result = evaluate(model, tiny_tokenizer, LABELLED, samples=1, base_model=load(tiny_base_folder))
    bare = evaluate(load(tiny_base_folder), tiny_tokenizer, LABELLED, samples=0, against_base=False)
    assert result.metrics["perplexity"].base == bare.metrics["perplexity"].value
    assert result.samples[0].base.text is not None


def test_modes_and_gradients_are_put_back(tiny_base_folder, tiny_tokenizer) -> None:
    for training in (True, False):
        model = adapted(tiny_base_folder, lora_dropout=0.5).train(training)
        model.requires_grad_(False)
        once = evaluate(model, tiny_tokenizer, LABELLED, samples=1)
        assert evaluate(model, tiny_tokenizer, LABELLED, samples=1).metrics == once.metrics  # no dropout
        assert model.training is training
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_free_text_is_generated_and_compared(tiny_base_folder, tiny_tokenizer) -> None:
    result = evaluate(adapted(tiny_base_folder), tiny_tokenizer, FREE, generate_rows=5)
    assert set(result.metrics) == {"perplexity", "exact_match", "bleu", "chrf"}
    assert result.labels == () and result.confusion is None
    assert sum(row.adapter.text is not None for row in result.rows) == 5
    notes = " ".join(result.notes)
    for words in ("5 of 8 rows", "sacrebleu: nrefs:1", "NFKC", "at most 5 tokens"):
        assert words in notes
    texts = {row.index: row.adapter.text for row in result.rows}
    assert all(sample.adapter.text == texts[sample.index] for sample in result.samples)
    tokens = sum(row.tokens for row in result.rows)
    assert f"over {tokens} tokens" in notes


def test_a_perfect_system_scores_100(tiny_base_folder, tiny_tokenizer) -> None:
    model = adapted(tiny_base_folder)
    written = evaluate(model, tiny_tokenizer, FREE, metrics=("generation",), against_base=False).rows
    rows = [
        Conversation(messages=(*row.messages[:-1], {"role": "assistant", "content": own.adapter.text}), origin="")
        for row, own in zip(FREE, written, strict=True)
        if own.adapter.text
    ]
    assert len(rows) > 3
    found = evaluate(model, tiny_tokenizer, rows, metrics=("generation",), labels="none").metrics
    assert found["exact_match"].value == 1
    assert found["chrf"].value == pytest.approx(100)
    assert found["exact_match"].base < 1


def test_groups_can_be_chosen(tiny_base_folder, tiny_tokenizer) -> None:
    model = adapted(tiny_base_folder)
    result = evaluate(model, tiny_tokenizer, LABELLED, metrics=("label",), samples=0)
    assert set(result.metrics) == {"accuracy", "macro_f1", "micro_f1"}
    assert result.rows[0].adapter.nll is None
    free = evaluate(model, tiny_tokenizer, LABELLED, labels="none", metrics=("perplexity",), samples=0)
    assert set(free.metrics) == {"perplexity"}
    forced = evaluate(model, tiny_tokenizer, LABELLED[:3], labels=["y", "x"], metrics=("label",), samples=0)
    assert forced.labels == ("y", "x")


def test_samples_prefer_rows_that_differ(tiny_base_folder, tiny_tokenizer) -> None:
    result = evaluate(adapted(tiny_base_folder, scale=3), tiny_tokenizer, LABELLED, samples=1)
    differing = {row.index for row in result.rows if row.adapter.label != row.base.label}
    assert differing, "the seed must make the two differ"
    assert result.samples[0].index in differing
    assert any(f"among the {len(differing)} of 12 rows" in note for note in result.notes)


def test_plain_text_has_perplexity_only(tiny_base_folder, tiny_tokenizer) -> None:
    rows = [Conversation(messages=(), origin=f"t:{n}", text=f"Some text number {n}.") for n in range(4)]
    result = evaluate(adapted(tiny_base_folder), tiny_tokenizer, rows)
    assert set(result.metrics) == {"perplexity"}
    assert result.samples == ()
    with pytest.raises(DataError, match="no row has a reference answer"):
        evaluate(adapted(tiny_base_folder), tiny_tokenizer, rows, metrics=("generation",))


def test_only_the_last_answer_is_the_reference(tiny_base_folder, tiny_tokenizer) -> None:
    turns = ("user", "assistant", "user", "assistant", "user")
    messages = tuple({"role": role, "content": f"turn {n}"} for n, role in enumerate(turns))
    result = evaluate(
        adapted(tiny_base_folder), tiny_tokenizer, [Conversation(messages=messages, origin="")], samples=1
    )
    assert result.rows[0].reference == "turn 3"
    assert [turn.content for turn in result.samples[0].prompt] == ["turn 0", "turn 1", "turn 2"]
    assert result.metrics["perplexity"].low is None
    assert any("no intervals" in note for note in result.notes)


def test_rows_left_out_are_counted(tiny_base_folder, tiny_tokenizer) -> None:
    unanswered = Conversation(messages=({"role": "user", "content": "?"},), origin="test.jsonl:98")
    rows = [*LABELLED, unanswered, asked("x", 99, "word " * 400)]
    result = evaluate(adapted(tiny_base_folder), tiny_tokenizer, rows, samples=0)
    assert len(result.rows) == 12
    notes = " ".join(result.notes)
    assert "1 of 14 rows have no reference answer and were left out (the first: test.jsonl:98)" in notes
    assert "1 of 14 rows are longer than the model's 256 tokens and were left out (the first: test.jsonl:99)" in notes


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        ([], {}, DataError, "the data is empty"),
        ([Conversation(({"role": "user", "content": "?"},), "x:1")], {}, DataError, "No row can be measured"),
        (LABELLED, {"labels": ["x", "sad"]}, DataError, "'sad' is the answer of no row"),
        (LABELLED, {"labels": "yes"}, InputError, "labels='yes' is not known"),
        (LABELLED, {"metrics": ("bleu",)}, InputError, "choose among label, perplexity, generation"),
        (LABELLED, {"metrics": ()}, InputError, "choose among"),
        (FREE, {"metrics": ("label",)}, DataError, "no label set"),
        (FREE, {"max_new_tokens": 1000}, DataError, "No row leaves room to generate 1000 tokens"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    tiny_base_folder, tiny_tokenizer, rows, options, error, message
) -> None:
    with pytest.raises(error, match=message) as found:
        evaluate(adapted(tiny_base_folder), tiny_tokenizer, rows, **options)
    assert "\n" not in str(found.value)


def test_a_bare_model_has_no_adapter_to_switch_off(tiny_base_folder, tiny_tokenizer) -> None:
    with pytest.raises(MismatchError, match="LlamaForCausalLM has no adapter"):
        evaluate(load(tiny_base_folder), tiny_tokenizer, LABELLED)
