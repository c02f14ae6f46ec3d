"""Rows of preferences: every format, every row that is left out with its reason, masks, and the split by prompt."""

import json
from pathlib import Path

import pytest

from haori.core.errors import DataError
from haori.tasks.preference.pairs import Judged, Pair
from haori.tasks.preference.recipe import PreferenceColumns, PreferenceData
from haori.tasks.preference.rows import PreferenceRows, load_preferences


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(path, tokenizer, *, one_by_one=False, tolerant=False, context_length=256, **section) -> PreferenceRows:
    return load_preferences(
        PreferenceData(path=str(path), **section), tokenizer, one_by_one=one_by_one, context_length=context_length,
        tolerant=tolerant,
    )  # fmt: skip


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def many(count: int) -> list[dict]:
    return [{"prompt": f"what is {i}?", "chosen": f"number {i}", "rejected": "no idea"} for i in range(count)]


def all_rows(data: PreferenceRows) -> list[dict]:
    return [*data.train, *data.validation]


def scored(tokenizer, row: dict, side: str = "") -> str:
    ids, labels = row[f"{side}input_ids"], row[f"{side}labels"]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode([token for token, label in zip(ids, labels, strict=True) if label != -100])


FORMS = {
    "texts": {"prompt": "is it good?", "chosen": "yes it is", "rejected": "never"},
    "messages": {
        "prompt": [user("is it good?")], "chosen": [assistant("yes it is")], "rejected": [assistant("never")]
    },
    "shared prompt": {
        "chosen": [user("is it good?"), assistant("yes it is")],
        "rejected": [user("is it good?"), assistant("never")],
    },
    "ultrafeedback": {
        "prompt": "is it good?", "prompt_id": "x",
        "chosen": [user("is it good?"), assistant("yes it is")], "score_chosen": 9.0,
        "rejected": [user("is it good?"), assistant("never")], "score_rejected": 2.0,
    },
    "hh": {
        "chosen": "\n\nHuman: is it good?\n\nAssistant: yes it is",
        "rejected": "\n\nHuman: is it good?\n\nAssistant: never",
    },
    "hh with a prompt": {
        "prompt": "\n\nHuman: is it good?\n\nAssistant:", "chosen": " yes it is", "rejected": " never"
    },
    "rated": {"prompt": "is it good?", "completions": ["perhaps", "never", "yes it is"], "scores": [5, 1, "9.5"]},
    "rated objects": {
        "instruction": "is it good?",
        "completions": [{"response": "never", "overall_score": 1.0}, {"response": "yes it is", "overall_score": 9.0}],
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_pair(tmp_path, tiny_tokenizer, form):
    rows = [FORMS[form], json.loads(json.dumps(FORMS[form]).replace("good", "bad"))]
    data = load(write(tmp_path / "a.jsonl", rows), tiny_tokenizer, validation_share=0)
    assert len(data.train) == 2 and not data.report.dropped
    row = data.train[0]
    prompt = tiny_tokenizer.apply_chat_template([user("is it good?")], add_generation_prompt=True, tokenize=False)
    assert tiny_tokenizer.decode(row["input_ids"][: row["prompt_length"]]) == prompt
    assert tiny_tokenizer.decode(row["rejected_input_ids"][: row["prompt_length"]]) == prompt
    lead = " " if form == "hh with a prompt" else ""  # an explicit answer is taken as it stands
    assert scored(tiny_tokenizer, row) == f"{lead}yes it is<|im_end|>"
    assert scored(tiny_tokenizer, row, "rejected_") == f"{lead}never<|im_end|>"
    assert row["desirable"] is None and row["longest"] == max(len(row["input_ids"]), len(row["rejected_input_ids"]))


def test_only_what_follows_the_shared_prompt_is_scored(tmp_path, tiny_tokenizer):
    history = [user("one"), assistant("first answer"), user("two")]
    row = {"chosen": [*history, assistant("good"), user("three"), assistant("better")],
           "rejected": [*history, assistant("bad")]}  # fmt: skip
    data = load(write(tmp_path / "a.jsonl", [row, *many(2)]), tiny_tokenizer, validation_share=0)
    assert scored(tiny_tokenizer, data.train[0]) == "good<|im_end|>better<|im_end|>"
    assert scored(tiny_tokenizer, data.train[0], "rejected_") == "bad<|im_end|>"


def test_control_tokens_in_answers_are_text(tmp_path, tiny_tokenizer):
    row = {"prompt": "say <|im_end|>", "chosen": "so <|im_end|> it is", "rejected": "no"}
    data = load(write(tmp_path / "a.jsonl", [row, *many(2)]), tiny_tokenizer, validation_share=0)
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [label for label in data.train[0]["labels"] if label == end] == [end]  # the answer's own end
    assert data.train[0]["input_ids"].count(end) == 2  # the user's turn and the answer's
    assert any("control token" in note for note in data.notes)


def test_every_row_left_out_is_counted_and_named(tmp_path, tiny_tokenizer):
    rows = [
        *many(20),
        {"prompt": "a", "chosen": "same", "rejected": "same"},
        {"prompt": "a", "chosen": " ", "rejected": "something"},
        {"prompt": "", "chosen": "x", "rejected": "y"},
        {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]},
        {"chosen": [user("a"), assistant("x")], "rejected": [user("a"), assistant("x"), user("c"), assistant("y")]},
        {"prompt": "a", "chosen": "x", "rejected": "y", "score_chosen": 3, "score_rejected": 3},
        {"prompt": "a", "chosen": "x", "rejected": "y", "score_chosen": 2, "score_rejected": 3},
        {"prompt": "long", "chosen": "word " * 300, "rejected": "y"},
        many(1)[0],
    ]
    report = load(write(tmp_path / "a.jsonl", rows), tiny_tokenizer).report
    found = {name: getattr(report, name) for name in (
        "read", "same_answers", "empty", "prompts_differ", "ties", "contradicted", "too_long", "duplicates"
    )}  # fmt: skip
    assert found == {
        "read": 29, "same_answers": 1, "empty": 2, "prompts_differ": 2, "ties": 1, "contradicted": 1,
        "too_long": 1, "duplicates": 1,
    }  # fmt: skip
    assert sum(report.rows.values()) == 20
    for words in ("the same answer twice", "prompts differ", "equal scores", "say the opposite", "data.max_length"):
        assert any(words in problem for problem in report.problems), words
    assert "1 with equal scores" in report.dropped and "2 whose prompts differ" in report.dropped


def test_rated_rows(tmp_path, tiny_tokenizer):
    rows = [
        {"prompt": "p", "completions": ["best", "good", "good too", "worst"], "scores": [4, 3, 3, 1]},
        {"prompt": "q", "completions": ["one", "two"], "scores": [1, 1]},
        {"prompt": "r", "completions": ["alone"], "scores": [1]},
        {"prompt": "s", "completions": ["up", "down"], "scores": [1, 0]},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    data = load(path, tiny_tokenizer, validation_share=0)
    pairs = [Pair.from_json(row["preference"], row["origin"]) for row in data.train]
    assert [[side.messages[-1]["content"] for side in pair.conversations] for pair in pairs] == [
        ["best", "worst"], ["up", "down"],
    ]  # fmt: skip
    assert (data.report.ties, data.report.alone) == (1, 1)
    every = load(path, tiny_tokenizer, validation_share=0, rated_pairs="all")
    assert len(every.train) == 5 + 1 and every.report.ties == 2


def test_scored_answers_one_to_a_row_are_gathered_by_prompt(tmp_path, tiny_tokenizer):
    rows = [{"prompt": p, "response": a, "score": s} for p, a, s in
            [("p", "good", 2), ("q", "yes", 5), ("p", "bad", 1), ("q", "no", 0), ("r", "alone", 1)]]  # fmt: skip
    data = load(write(tmp_path / "a.jsonl", rows), tiny_tokenizer, validation_share=0)
    assert [scored(tiny_tokenizer, row) for row in data.train] == ["good<|im_end|>", "yes<|im_end|>"]
    assert data.report.alone == 1


def test_judged_answers(tmp_path, tiny_tokenizer):
    rows = [{"prompt": f"p{i}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(20)]
    path = write(tmp_path / "a.jsonl", rows)
    data = load(path, tiny_tokenizer, one_by_one=True)
    assert {row["origin"].rpartition(":")[2]: row["desirable"] for row in all_rows(data)} == {
        str(i + 1): i % 2 == 0 for i in range(20)
    }
    assert all(row["rejected_input_ids"] is None for row in all_rows(data))
    assert data.report.desirable["train"] + data.report.desirable["validation"] == 10
    with pytest.raises(DataError, match=r"loss\.kind=kto"):
        load(path, tiny_tokenizer)


def test_labels_of_tables_and_broken_ones(tmp_path, tiny_tokenizer):
    table = tmp_path / "a.csv"
    table.write_text("prompt,completion,label\np,a,true\nq,b,FALSE\nr,c,1\ns,d,0\n", encoding="utf-8")
    data = load(table, tiny_tokenizer, one_by_one=True, validation_share=0)
    assert list(data.train["desirable"]) == [True, False, True, False]
    table.write_text("prompt,completion,label\np,a,true\nq,b,perhaps\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv:3:label: label must be true or false"):
        load(table, tiny_tokenizer, one_by_one=True)


def test_pairs_for_kto_are_taken_apart(tmp_path, tiny_tokenizer):
    data = load(write(tmp_path / "a.jsonl", many(20)), tiny_tokenizer, one_by_one=True)
    rows = all_rows(data)
    assert len(rows) == 40 and sum(row["desirable"] for row in rows) == 20
    for row in rows:
        found = Judged.from_json(row["preference"], row["origin"])
        assert found.desirable == found.answered.messages[-1]["content"].startswith("number")


def test_kto_refuses_one_kind_only_and_one_prompt_only(tmp_path, tiny_tokenizer):
    good = [{"prompt": f"p{i}", "completion": "a", "label": True} for i in range(9)]
    with pytest.raises(DataError, match="training rows are good answers"):
        load(write(tmp_path / "a.jsonl", good), tiny_tokenizer, one_by_one=True)
    same = [{"prompt": "p", "completion": f"a{i}", "label": i % 2 == 0} for i in range(9)]
    with pytest.raises(DataError, match="same prompt"):
        load(write(tmp_path / "b.jsonl", same), tiny_tokenizer, one_by_one=True, validation_share=0)


def test_the_pairs_of_a_prompt_are_on_one_side(tmp_path, tiny_tokenizer):
    rows = [{"prompt": f"what is {i}?", "chosen": f"number {i}", "rejected": f"no idea {k}"}
            for k in range(4) for i in range(40)]  # fmt: skip
    data = load(write(tmp_path / "a.jsonl", rows), tiny_tokenizer, validation_share=0.2)
    train, held = set(data.train["prompt"]), set(data.validation["prompt"])
    assert train and held and not train & held
    assert len(data.train) + len(data.validation) == 160
    assert data.report.leaks.exact == 0
    turns = [user("hello"), assistant("hi")]
    history = [{"prompt": [*turns, user(f"what is {i}?")], "chosen": f"{i}", "rejected": f"n{k}"}
               for k in range(3) for i in range(30)]  # fmt: skip
    data = load(write(tmp_path / "b.jsonl", history), tiny_tokenizer, validation_share=0.2)
    train, held = set(data.train["prompt"]), set(data.validation["prompt"])
    assert train and held and not train & held


def test_one_prompt_cannot_be_split(tmp_path, tiny_tokenizer):
    rows = [{"prompt": "the same", "chosen": f"yes {i}", "rejected": "no"} for i in range(9)]
    with pytest.raises(DataError, match="answer the same prompt"):
        load(write(tmp_path / "a.jsonl", rows), tiny_tokenizer)


def test_a_prompt_in_both_files_is_a_leak(tmp_path, tiny_tokenizer):
    held = write(tmp_path / "held.jsonl", [{"prompt": "What is 3?", "chosen": "three", "rejected": "four"}])
    report = load(write(tmp_path / "a.jsonl", many(9)), tiny_tokenizer, validation=held).report
    assert report.leaks.exact == 1 and any("what is 3?" in problem for problem in report.problems)


def test_opposite_pairs_are_kept_and_named(tmp_path, tiny_tokenizer):
    rows = [*many(9), {"prompt": "what is 3?", "chosen": "no idea", "rejected": "number 3"}]
    data = load(write(tmp_path / "a.jsonl", rows), tiny_tokenizer)
    assert sum(data.report.rows.values()) == 10
    assert any("say the opposite of another row, kept: 1" in note for note in data.notes)


def test_second_run_reads_the_cache(tmp_path, tiny_tokenizer, haori_home):
    path = write(tmp_path / "a.jsonl", many(20))
    first = load(path, tiny_tokenizer)
    (folder,) = (haori_home / "cache" / "data").iterdir()
    stamp = (folder / "rows.arrow").stat().st_ino
    assert load(path, tiny_tokenizer).report == first.report
    assert (folder / "rows.arrow").stat().st_ino == stamp
    assert load(path, tiny_tokenizer, one_by_one=True).report.hash != first.report.hash


def test_columns_of_any_name(tmp_path, tiny_tokenizer):
    rows = [{"ask": f"p{i}", "good": "yes", "bad": "no", "mood": "x"} for i in range(4)]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"'ask', 'good', 'bad', 'mood'.*data\.columns\.chosen"):
        load(path, tiny_tokenizer)
    named = PreferenceColumns(prompt="ask", chosen="good", rejected="bad")
    data = load(path, tiny_tokenizer, validation_share=0, columns=named)
    assert len(data.train) == 4 and any("mood" in note for note in data.notes)
    with pytest.raises(DataError, match=r"no column 'god' \(data\.columns\.chosen\); did you mean 'good'"):
        load(path, tiny_tokenizer, columns=PreferenceColumns(prompt="ask", chosen="god", rejected="bad"))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": "yes", "rejected": "no"}, "an answer without its prompt"),
        ({"prompt": "p", "chosen": 3, "rejected": "no"}, "a list of messages, not int"),
        ({"prompt": "p", "chosen": [user("p")], "rejected": "no"}, "must be the assistant's, not the user's"),
        ({"prompt": "p", "chosen": [user("q"), assistant("a")], "rejected": "no"}, "does not hold the prompt"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1]}, "there are 2 answers and 1 scores"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1, "high"]}, r"scores\[1\]: a score must be a number"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1, True]}, "a score must be a number"),
        ({"prompt": "p", "completions": [{"response": "a"}]}, "no score goes with this answer"),
    ],
)
def test_mistakes_name_row_and_field(tmp_path, tiny_tokenizer, row, words):
    path = write(tmp_path / "a.jsonl", [row, row])
    with pytest.raises(DataError, match=rf"a\.jsonl:1:.*{words}"):
        load(path, tiny_tokenizer)
    report = load(path, tiny_tokenizer, tolerant=True).report
    assert report.refused and report.broken == 2


def test_too_long_may_be_an_error(tmp_path, tiny_tokenizer):
    rows = [*many(4), {"prompt": "long", "chosen": "word " * 300, "rejected": "y"}]
    with pytest.raises(DataError, match=r"a\.jsonl:5: prompt and answer have \d+ tokens and data\.max_length is 100"):
        load(write(tmp_path / "a.jsonl", rows), tiny_tokenizer, too_long="error", max_length=100)
    with pytest.raises(DataError, match="reads at most 256 tokens"):
        load(write(tmp_path / "a.jsonl", rows), tiny_tokenizer, max_length=1000)


def test_a_system_message_goes_before_both(tmp_path, tiny_tokenizer):
    data = load(write(tmp_path / "a.jsonl", many(4)), tiny_tokenizer, validation_share=0, system="be brief")
    for side in ("", "rejected_"):
        assert "system\nbe brief" in tiny_tokenizer.decode(data.train[0][f"{side}input_ids"])
