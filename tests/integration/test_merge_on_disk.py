"""`haori merge --stream`: the merged checkpoint is what stock PEFT makes; a kill leaves nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from haori.bases import find_base
from haori.library import Library, import_adapter
from tests.command_line import haori
from tests.conftest import build_tiny_base
from tests.library_samples import run, stock_logits, stock_lora


@pytest.mark.parametrize("options", [
    {}, {"use_dora": True}, {"use_rslora": True, "target_modules": ["embed_tokens", "down_proj"]},
])  # fmt: skip
def test_the_merged_model_is_base_and_adapter(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, object]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock_lora(tiny_base_folder, tmp_path / "a", **options)
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    import_adapter(tmp_path / "a", find_base(str(tiny_base_folder)), name="a")
    done = haori(capsys, "merge", "a", "--out", tmp_path / "merged", "--stream")
    assert done.code == 0, done.err
    from transformers import AutoTokenizer

    assert_alike(logits(tmp_path / "merged"), stock_logits(tiny_base_folder, tmp_path / "a"), logits(tiny_base_folder))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "{{ messages[0]['content'] }}"
    record = json.loads((tmp_path / "merged" / "haori_merge.json").read_text())
    assert record["names"] == ["a@1"]
    assert [check["name"] for check in record["verification"]["checks"]] == ["written", "unchanged", "rounding"]


@pytest.fixture
def gpt2(tiny_base_folder: Path, tmp_path: Path) -> Path:
    """A GPT-2, whose layers keep their weights as [in, out], some of them square."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    sizes = {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    shutil.copytree(tiny_base_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    return folder


def test_transposed_layers(gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Merged, blended and extracted, all judged by what stock PEFT and transformers compute."""
    options = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    base = find_base(str(gpt2))
    for seed, name in enumerate(("a", "b")):
        import_adapter(stock_lora(gpt2, tmp_path / name, seed=seed, **options), base, name=name)
    assert haori(capsys, "merge", "a", "--out", tmp_path / "merged", "--stream").code == 0
    assert_alike(logits(tmp_path / "merged"), stock_logits(gpt2, tmp_path / "a"), logits(gpt2))
    assert haori(capsys, "blend", "a:2", "b:-1", "--name", "ab").code == 0
    assert haori(capsys, "merge", "ab", "--out", tmp_path / "blend", "--stream").code == 0
    assert haori(capsys, "merge", "b", "--out", tmp_path / "b-merged", "--stream").code == 0
    one, two, none, both = (weights(tmp_path / name) for name in ("merged", "b-merged", "gpt2", "blend"))
    for name, weight in none.items():
        expected = 2 * (one[name] - weight) - (two[name] - weight)
        assert float((both[name] - weight - expected).abs().max()) < 1e-5, name
    arguments = ["--base", gpt2, "--tuned", tmp_path / "merged", "--rank", 4, "--name", "again"]
    assert haori(capsys, "extract", *arguments).code == 0
    assert_alike(stock_logits(gpt2, Library().get("again").path), logits(tmp_path / "merged"), logits(gpt2))


def logits(folder: Path) -> list[Tensor]:
    from transformers import AutoModelForCausalLM

    return run(AutoModelForCausalLM.from_pretrained(folder).eval())


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_alike(found: list[Tensor], expected: list[Tensor], bare: list[Tensor]) -> None:
    """A thousandth of the effect is allowed: the fp32 of the logits."""
    for one, other, base in zip(found, expected, bare, strict=True):
        assert float((one - other).abs().max()) < 1e-3 * float((other - base).abs().max())


def test_a_base_larger_than_memory_is_merged_on_disk(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from haori.library.checkpoints import stored

    import_adapter(stock_lora(tiny_base_folder, tmp_path / "a"), find_base(str(tiny_base_folder)), name="a")
    size = find_base(str(tiny_base_folder)).size_bytes
    for free, names in ((2 * size, ["written", "unchanged", "rounding"]), (4 * size, ["merge", "rounding", "written"])):
        monkeypatch.setattr(stored, "_free_bytes", lambda free=free: free)
        out = tmp_path / f"merged-{free}"
        assert haori(capsys, "merge", "a", "--out", out).code == 0
        proof = json.loads((out / "haori_merge.json").read_text())["verification"]
        assert [check["name"] for check in proof["checks"]] == names


def test_on_disk_each_tensor_keeps_its_dtype(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_adapter(stock_lora(tiny_base_folder, tmp_path / "a"), find_base(str(tiny_base_folder)), name="a")
    done = haori(capsys, "merge", "a", "--out", tmp_path / "merged", "--stream", "--dtype", "fp16")
    assert done.code == 2
    assert "leave --dtype out" in done.err
    assert not (tmp_path / "merged").exists()


def killed_at(moment: str, arguments: list[str], home: Path) -> None:
    """Run the command line in a process that stops at a line of its work, and kill it there."""
    code = f"""
import sys, time
from haori.cli.app import main
import haori.core.storage as storage
from haori.library.checkpoints import merging
from haori.library import store
from haori.library.combining import storing
def stop(*_, **__):
    print("there", flush=True)
    time.sleep(60)
{moment}
sys.argv = ["haori", *{arguments!r}]
main()
"""
    environment = {**os.environ, "HAORI_HOME": str(home)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert line == "there\n"


@pytest.mark.parametrize("moment", ["merging._prove = stop", "storage._sync = stop"])
def test_a_killed_merge_leaves_nothing_half_written(
    tiny_base_folder: Path, tmp_path: Path, haori_home: Path, moment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import_adapter(stock_lora(tiny_base_folder, tmp_path / "a"), find_base(str(tiny_base_folder)), name="a")
    out = tmp_path / "merged"
    killed_at(moment, ["merge", "a", "--out", str(out), "--stream"], haori_home)
    assert not out.exists()
    done = haori(capsys, "merge", "a", "--out", out, "--stream")
    assert done.code == 0, done.err
    assert (out / "haori_merge.json").is_file()


def test_a_killed_extract_leaves_the_library_as_it_was(
    tiny_base_folder: Path, tmp_path: Path, haori_home: Path
) -> None:
    tuned = build_tiny_base(tmp_path / "tuned", seed=3)
    arguments = ["--base", str(tiny_base_folder), "--tuned", str(tuned), "--rank", "4", "--name", "x"]
    killed_at("store.copy_contents = stop", ["extract", *arguments], haori_home)
    assert Library().list() == ()
    assert Library().rebuild().problems == ()


@pytest.mark.parametrize("moment", ["storing.verify_adapter = stop", "store.copy_contents = stop"])
def test_a_killed_blend_leaves_the_library_as_it_was(
    tiny_base_folder: Path, tmp_path: Path, haori_home: Path, moment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = find_base(str(tiny_base_folder))
    for seed, name in enumerate(("a", "b")):
        import_adapter(stock_lora(tiny_base_folder, tmp_path / name, seed=seed), base, name=name)
    killed_at(moment, ["blend", "a:0.4", "b:0.6", "--name", "ab"], haori_home)
    assert [stored.name for stored in Library().list()] == ["a@1", "b@1"]
    done = haori(capsys, "blend", "a:0.4", "b:0.6", "--name", "ab")
    assert done.code == 0, done.err
    assert [stored.name for stored in Library().list()] == ["a@1", "ab@1", "b@1"]
    problems = Library().rebuild().problems
    assert problems == ()
