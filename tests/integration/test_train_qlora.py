"""QLoRA through the command line: trained over a quantised base, proved over both, merged into the base itself."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

import haori
from haori.core.quantization import Quantization
from haori.library import merge_stored, verify_adapter
from haori.training import resume_run, train_run
from tests.command_line import haori as haori_command

pytest.importorskip("bitsandbytes")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"what is number {i}?", "completion": f"it is {'odd' if i % 2 else 'even'}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SETTINGS = ["method.kind=qlora", "training.epochs=2", "method.rank=4", "optimizer.lr=1e-2"]


def stock_quantised(base: Path, bits: int):
    """The base as a user of stock transformers would quantise it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    config = four_bit if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config, device_map="cpu")


@pytest.mark.parametrize(
    "overrides", [("method.bits=4",), ("method.bits=8",), ("method.init=loftq", "method.rslora=true")]
)
def test_an_adapter_is_proved_reloads_in_stock_peft_and_merges(capsys, tiny_base_folder, data, tmp_path, overrides):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = [*SETTINGS, *overrides, "training.dtype=fp32"]
    words = [word for setting in settings for word in ("--set", setting)]
    done = haori_command(capsys, "train", "--base", tiny_base_folder, "--data", data, "--name", "small", *words)
    assert done.code == 0, done.err
    assert "small@1 is trained and proved: 9 checks passed" in done.out
    bits = 8 if "method.bits=8" in overrides else 4
    assert f"method.bits = {bits}" in done.err
    assert "the base's weights take" in done.err
    stored = haori.Library().get("small")
    checks = {check.name: check for check in stored.card.verification.checks}
    assert checks["reload"].value == 0.0
    assert 0 < checks["quantization"].value < checks["quantization"].limit
    assert not checks["merge"].detail.startswith("skipped")
    assert "bitsandbytes" in stored.card.versions
    again = haori_command(capsys, "library", "verify", "small")
    assert again.code == 0, again.err
    proved = {check.name: check for check in haori.Library().get("small").card.verification.checks}
    assert proved["quantization"].limit == pytest.approx(checks["quantization"].limit, rel=0.1)
    # The card's base is the original one, so the adapter attaches to that.
    assert stored.card.base.quantization is None
    assert stored.card.base.fingerprint == haori.bases.find_base(str(tiny_base_folder)).fingerprint
    assert stored.card.run.validation_loss < stored.card.run.initial_validation_loss - 0.05
    assert stored.card.rank == (8 if "method.init=loftq" in overrides else 4)

    ids = torch.arange(5, 30)[None]
    ours = haori.library.attach_files(
        haori.bases.load_model(
            haori.bases.find_base(str(tiny_base_folder)), dtype="fp32", device="cpu", quantization=Quantization(bits)
        ),
        haori.library.inspect_adapter(stored.path),
        base_name="tiny",
    ).eval()
    theirs = PeftModel.from_pretrained(stock_quantised(tiny_base_folder, bits), stored.path)
    # In training mode (there is no dropout) bitsandbytes does not repack 4-bit weights to a coarser format.
    theirs.train(bits == 4)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
        merged = AutoModelForCausalLM.from_pretrained(
            merge_stored("small", tmp_path / "merged"), dtype=torch.float32, local_files_only=True
        ).eval()
        plain = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32), stored.path
        ).eval()
        exact = plain(ids).logits
        assert (merged(ids).logits - exact).std() < 0.02 * exact.std()  # bf16 rounding of the weights
        assert (exact - plain.get_base_model()(ids).logits).std() == 0  # the adapter is inside the base model's layers


def test_loftq_is_closer_to_the_base_at_the_start_than_a_random_start(tiny_base_folder, data):
    """The first validation runs before any step: with LoftQ the model loses less by being quantised."""
    losses = {}
    for init, rank in (("default", 4), ("loftq", 32)):
        overrides = [
            *SETTINGS,
            f"method.init={init}",
            f"method.rank={rank}",
            "training.max_steps=1",
            "training.dtype=fp32",
        ]
        run = train_run(haori.api.recipe_of(None, str(tiny_base_folder), str(data), init, overrides))
        losses[init] = run.record.initial_validation_loss
    lora = [*SETTINGS[1:], "method.kind=lora", "training.max_steps=1", "training.dtype=fp32"]
    exact = train_run(haori.api.recipe_of(None, str(tiny_base_folder), str(data), "lora", lora)).record
    assert abs(losses["loftq"] - exact.initial_validation_loss) < abs(losses["default"] - exact.initial_validation_loss)


@pytest.mark.parametrize("overrides", [("method.init=loftq",), ("method.bits=8", "method.dropout=0.1")])
def test_a_stopped_run_resumes_to_the_same_bytes(tiny_base_folder, data, overrides):
    settings = [*SETTINGS, *overrides, "training.save_every=1", "training.max_steps=5"]
    recipe = haori.api.recipe_of(None, str(tiny_base_folder), str(data), "x", settings)
    whole = train_run(recipe)

    def stop_at_three(event):
        if event.kind == "progress" and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    part = train_run(recipe, on_event=stop_at_three)
    assert part.signal == signal.SIGINT
    rest = resume_run(part.folder)
    assert rest.record.steps == whole.record.steps > 3
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (rest.folder / "adapter" / name).read_bytes() == (whole.folder / "adapter" / name).read_bytes()


def test_the_proof_tells_an_adapter_of_another_base_apart(tiny_base_folder, data, tmp_path):
    """Over other weights the adapter's answers move more than its own effect, and more than quantisation explains."""
    from safetensors.torch import load_file, save_file

    run = train_run(
        haori.api.recipe_of(None, str(tiny_base_folder), str(data), "x", [*SETTINGS, "training.max_steps=1"])
    )
    base = haori.bases.find_base(str(tiny_base_folder))
    good = verify_adapter(base, run.folder / "adapter", dtype="fp32", device="cpu", quantization=Quantization())
    assert good.passed
    path = run.folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    weights[sorted(weights)[0]][0, 0] = float("nan")
    save_file(weights, path)
    bad = verify_adapter(base, run.folder / "adapter", dtype="fp32", device="cpu", quantization=Quantization())
    assert [check.name for check in bad.failures] == ["finite"]
