"""Preference learning from the command line and Python: every loss, resume, processes, proof, and stock PEFT."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import haori
from haori.core.errors import DataError, RecipeError
from haori.tasks.recipe import kept_recipe, recipe_from
from tests.command_line import haori as haori_command

QUICK = ["training.dtype=fp32", "method.rank=4", "optimizer.lr=5e-3", "training.epochs=2", "training.batch_tokens=400"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"what is {i}? {'x ' * (i % 7)}", "chosen": f"number {i} it is", "rejected": f"no idea {i % 5}"}
        for i in range(48)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(base: Path, data: Path, name: str, *overrides: str):
    return haori.train(
        base=str(base), data=str(data), name=name, task="preference", overrides=[*QUICK, *overrides], progress=False
    )


def lines(folder: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


@pytest.mark.parametrize("kind", ["dpo", "ipo", "hinge", "orpo", "simpo", "kto"])
def test_every_loss_learns_what_is_preferred(tiny_base_folder, data, kind):
    run = train(tiny_base_folder, data, kind, f"loss.kind={kind}")
    before, *_, after = lines(run.folder, "validation")
    assert after["loss"] < before["loss"] and after["accuracy"] > 0.7
    assert after["margin"] > before["margin"]
    assert after["margin"] == pytest.approx(after["chosen_reward"] - after["rejected_reward"], abs=1e-4)
    if kind in {"dpo", "ipo", "hinge", "kto"}:  # the reference is the model before its first step
        assert before["margin"] == pytest.approx(0, abs=1e-5) and before["accuracy"] == pytest.approx(0.5, abs=0.5)
    assert run.verification is not None and run.verification.passed
    recipe = kept_recipe(run.adapter.card)
    assert (recipe.task, recipe.loss.kind) == ("preference", kind)
    assert lines(run.folder, "train")[0]["rows"] > 0


def test_the_adapter_is_a_language_models_in_stock_peft(tiny_base_folder, data, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = train(tiny_base_folder, data, "liked")
    folder = run.folder / "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    base = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, folder).eval()
    opened = haori.open_adapter("liked", dtype="fp32")
    ids = opened.tokenizer("what is 7?", return_tensors="pt").input_ids
    with torch.no_grad():
        ours = opened.model(ids).logits
        assert torch.equal(ours, theirs(ids).logits)
        with opened.strength(on=False):
            assert not torch.equal(ours, opened.model(ids).logits)
    assert isinstance(opened.answer("what is 7?", max_new_tokens=8), str)


def test_accumulating_gradients_changes_nothing(tiny_base_folder, data):
    eps = "optimizer.eps=1e-3"  # Adam divides tiny gradients by their own size: rounding would become whole steps
    for kind in ("dpo", "orpo"):
        found = [
            load_file(train(tiny_base_folder, data, f"{kind}{micro}", f"loss.kind={kind}", eps,
                            f"training.micro_batch_tokens={micro}").folder / "adapter/adapter_model.safetensors")
            for micro in (100, 2000)
        ]  # fmt: skip
        for name in found[0]:
            torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("settings", [["method.dropout=0.1"], ["loss.kind=kto"], ["method.kind=full"]])
def test_a_stopped_run_resumes_to_the_same_bytes(tiny_base_folder, data, tmp_path, haori_home, settings):
    """Also where the cache was emptied: the reference is computed before the checkpoint is restored."""
    saved = ["training.save_every=1", *settings]
    if settings == ["method.kind=full"]:
        words = ["training.dtype=fp32", "training.epochs=2", "training.batch_tokens=400", "optimizer.lr=1e-3", *saved]
    else:
        words = [*QUICK, *saved]
    whole = haori.train(
        base=str(tiny_base_folder), data=str(data), name="whole", task="preference", overrides=words, progress=False
    )
    home = tmp_path / "stopped-home"
    flags = [word for key in words for word in ("--set", key)]
    process = subprocess.Popen(
        [sys.executable, "-m", "haori.cli.app", "train", "--task", "preference", "--base", str(tiny_base_folder),
         "--data", str(data), "--name", "stopped", *flags],
        env={**os.environ, "HAORI_HOME": str(home)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    folder: Path | None = None
    while time.monotonic() < deadline and process.poll() is None:
        folder = next(iter(home.glob("runs/*")), None)
        if folder is not None and (folder / "metrics.jsonl").exists() and len(lines(folder, "train")) >= 3:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.002)
    out, err = process.communicate(timeout=120)
    assert folder is not None and process.returncode == 143, (out, err)
    for kept in (home / "cache" / "reference").iterdir():
        for file in kept.iterdir():
            file.unlink()
    resumed = subprocess.run(
        [sys.executable, "-m", "haori.cli.app", "train", "--resume", str(folder)],
        env={**os.environ, "HAORI_HOME": str(home)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    name = "model/model.safetensors" if settings == ["method.kind=full"] else "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (whole.folder / name).read_bytes()
    for kind in ("train", "validation"):
        timeless = [[{k: v for k, v in line.items() if k != "seconds"} for line in lines(run, kind)]
                    for run in (folder, whole.folder)]  # fmt: skip
        assert timeless[0] == timeless[1]


def test_two_processes_learn_what_one_learns(tiny_base_folder, data, tmp_path):
    settings = [*QUICK, "optimizer.eps=1e-3", "training.micro_batch_tokens=160"]
    flags = [word for key in settings for word in ("--set", key)]
    found, validations = [], []
    for processes in (1, 2):
        launcher = [sys.executable]
        if processes == 2:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        home = tmp_path / f"home-{processes}"
        done = subprocess.run(
            [*launcher, "-m", "haori.cli.app", "train", "--task", "preference", "--base", str(tiny_base_folder),
             "--data", str(data), "--name", "x", *flags],
            env={**os.environ, "HAORI_HOME": str(home)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (folder,) = (home / "runs").iterdir()
        found.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
        validations.append(lines(folder, "validation")[-1])
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=2e-3, atol=5e-5)
    for key in ("loss", "margin", "chosen_reward"):
        assert validations[0][key] == pytest.approx(validations[1][key], rel=2e-3, abs=1e-4)


def test_a_dry_run_shows_both_answers_and_scores_nothing(capsys, tiny_base_folder, data, haori_home):
    done = haori_command(
        capsys, "train", "--task", "preference", "--base", tiny_base_folder, "--data", data, "--name", "x", "--dry-run",
        "--set", "data.max_rows=30",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "(chosen)" in done.out and "(rejected)" in done.out and "optimizer steps" in done.out
    assert not (haori_home / "cache" / "reference").exists()


def test_data_is_checked_without_a_loss(capsys, tiny_base_folder, tmp_path):
    path = tmp_path / "judged.jsonl"
    rows = [{"prompt": f"p{i}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = haori_command(
        capsys, "data", "check", path, "--task", "preference", "--base", tiny_base_folder, "--show", "1"
    )
    assert done.code == 0, done.err
    assert "judged" in done.out and ("(good)" in done.out or "(bad)" in done.out)
    with pytest.raises(DataError, match=r"loss\.kind=kto"):
        train(tiny_base_folder, path, "x")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loss.betta=1", "no key 'loss.betta' for the loss 'dpo'; did you mean 'beta'"),
        ("loss.gamma=1", "no key 'loss.gamma' for the loss 'dpo'"),
        ("loss.kind=dop", "cannot be 'dop'; it is one of dpo, ipo, hinge, orpo, simpo, kto; did you mean 'dpo'"),
        ("loss.beta=0", "'loss.beta' cannot be 0; it should be greater than 0"),
        ("data.train_on=all", "no key 'data.train_on' for the task 'preference'"),
        ("data.too_long=truncate", "'data.too_long' cannot be 'truncate'; it should be 'drop' or 'error'"),
    ],
)
def test_keys_that_the_task_does_not_know(override, words):
    with pytest.raises(RecipeError, match=words.replace("?", r"\?")):
        recipe_from({"name": "x", "base": "b", "task": "preference", "data": {"path": "p"}}, [override])


def test_another_tasks_recipe_has_no_loss_section():
    with pytest.raises(RecipeError, match="no key 'loss'"):
        recipe_from({"name": "x", "base": "b", "data": {"path": "p"}}, ["loss.kind=dpo"])


def test_a_sweep_trains_each_trial_as_its_task(capsys, tiny_base_folder, data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: swept\nbase: {tiny_base_folder}\ntask: preference\ndata:\n  path: {data}\nloss:\n  kind: ipo\n"
    )
    flags = [word for key in (*QUICK, "training.epochs=1") for word in ("--set", key)]
    done = haori_command(
        capsys, "sweep", recipe, "--over", "optimizer.lr=0.0001,0.01", "--trials", "2", "--out", tmp_path / "best.yaml",
        *flags,
    )  # fmt: skip
    assert done.code == 0, done.err
    best = haori.load_recipe(tmp_path / "best.yaml")
    assert (best.task, best.loss.kind, best.optimizer.lr) == ("preference", "ipo", 0.01)


def sums(model, rows) -> torch.Tensor:
    """Return log p(answer | prompt) of the chosen and the rejected answers [N, 2], one sequence at a time."""
    found = []
    for row in rows:
        for ids, labels in ((row["input_ids"], row["labels"]), (row["rejected_input_ids"], row["rejected_labels"])):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
            found.append(sum(float(logits[p, t]) for p, t in enumerate(labels[1:]) if t != -100))
    return torch.tensor(found).view(-1, 2)


def test_going_on_from_an_adapter_with_it_or_the_base_as_reference(tiny_base_folder, data, tmp_path, haori_home):
    taught = tmp_path / "taught.jsonl"
    rows = [{"prompt": f"what is {i}?", "completion": f"number {i} it is"} for i in range(40)]
    taught.write_text("".join(json.dumps(row) + "\n" for row in rows))
    haori.train(base=str(tiny_base_folder), data=str(taught), name="taught", overrides=QUICK, progress=False)
    quick = [key for key in QUICK if not key.startswith("method.")]
    first: dict[str, dict] = {}
    for reference in ("start", "base"):
        run = haori.train(
            base=str(tiny_base_folder), data=str(data), name=reference, task="preference", progress=False,
            overrides=[*quick, "from=taught", f"loss.reference={reference}"],
        )  # fmt: skip
        first[reference] = lines(run.folder, "validation")[0]
        assert lines(run.folder, "validation")[-1]["loss"] < first[reference]["loss"]
        assert run.adapter.card.parents
    assert first["start"]["margin"] == pytest.approx(0, abs=1e-4)
    assert first["start"]["loss"] == pytest.approx(0.6931, abs=1e-3)
    from haori.tasks.preference.recipe import PreferenceData
    from haori.tasks.preference.rows import load_preferences

    opened = haori.open_adapter("taught", dtype="fp32")
    held = load_preferences(
        PreferenceData(path=str(data)), opened.tokenizer, one_by_one=False, context_length=256
    ).validation
    policy = sums(opened.model, held)
    with opened.strength(on=False):
        ratios = policy - sums(opened.model, held)
    wanted = 0.1 * (ratios[:, 0] - ratios[:, 1])
    assert first["base"]["margin"] == pytest.approx(float(wanted.mean()), rel=1e-3)
    assert first["base"]["loss"] == pytest.approx(float(-torch.nn.functional.logsigmoid(wanted).mean()), rel=1e-3)
    kept = {path.name for path in (haori_home / "cache" / "reference").iterdir()}
    train(tiny_base_folder, data, "fresh", "training.epochs=1")  # the base's log-probabilities are those of a fresh run
    assert {path.name for path in (haori_home / "cache" / "reference").iterdir()} == kept


@pytest.mark.parametrize("key", ["loss.beta", "loss.kind"])
def test_a_sweep_over_the_loss_is_refused(capsys, tiny_base_folder, data, tmp_path, key):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: swept\nbase: {tiny_base_folder}\ntask: preference\ndata:\n  path: {data}\n")
    done = haori_command(capsys, "sweep", recipe, "--over", f"{key}=dpo,ipo" if "kind" in key else f"{key}=0.1,0.5")
    assert done.code == RecipeError.exit_code
    assert f"'{key}' cannot be varied: validation losses of trials with another loss cannot be compared" in done.err
