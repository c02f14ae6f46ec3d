import json
import shutil
import warnings
from pathlib import Path

import pytest

from haori.bases import find_base, load_tokenizer
from haori.core.errors import BaseError, FileFormatError, InputError, MismatchError, VerificationError
from haori.core.records import Verification
from haori.library import (
    Library,
    attach,
    default_probes,
    draft_card,
    import_adapter,
    live_probe_logits,
    merge_adapter,
    require_passed,
    verify_adapter,
)
from tests.conftest import build_tiny_base
from tests.library_samples import (
    change_tensors,
    save_stock,
    stock_lora,
    stock_model,
    written_adapter,
)


@pytest.fixture
def base(tiny_base_folder):
    return find_base(str(tiny_base_folder))


@pytest.fixture(scope="module")
def good(tiny_base_folder, tmp_path_factory) -> Path:
    return stock_lora(tiny_base_folder, tmp_path_factory.mktemp("adapter") / "good", target_modules="all-linear")


@pytest.fixture
def adapter(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def check(verification: Verification, name: str):
    return next(check for check in verification.checks if check.name == name)


def verify(base, folder, **options) -> Verification:
    return verify_adapter(base, folder, dtype="fp32", **options)


def test_a_good_adapter_passes_every_check(base, good):
    verification = verify(base, good)
    assert verification.passed and verification.dtype == "fp32"
    names = [check.name for check in verification.checks]
    assert names == ["files", "finite", "keys", "delta", "effect", "reload", "merge", "prompt"]
    assert "14 of 14 modules" in check(verification, "delta").detail
    assert check(verification, "effect").value > 0.01
    assert 0 < check(verification, "merge").value < 1e-5
    require_passed(verification)


def _zero_b(tensors):
    tensors.update({key: value * 0 for key, value in tensors.items() if "lora_B" in key})


def _one_zero_b(tensors):
    key = next(key for key in tensors if "lora_B" in key)
    tensors[key] = tensors[key] * 0


def _nan(tensors):
    tensors[next(key for key in tensors if "lora_A" in key)][0, 0] = float("nan")


def _infinity(tensors):
    tensors[next(key for key in tensors if "lora_B" in key)][0, 0] = float("inf")


def _wide(tensors):
    import torch

    key = next(key for key in tensors if "q_proj.lora_A" in key)
    tensors[key] = torch.ones(4, 65)


def _other_rank(tensors):
    import torch

    for key in [key for key in tensors if "layers.0.self_attn.q_proj" in key]:
        tensors[key] = torch.ones(6, 64) if "lora_A" in key else torch.ones(64, 6)


def _renamed(tensors):
    for key in list(tensors):
        tensors[key.replace("self_attn", "attention").replace("mlp", "ffn")] = tensors.pop(key)


def _extra(tensors):
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = next(iter(tensors.values())).clone()


def _extra_part(tensors):
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"] = next(iter(tensors.values())).clone()


def _hostile_name(tensors):
    tensors["../../etc/passwd"] = next(iter(tensors.values())).clone()


def _lost(tensors):
    tensors.pop(next(key for key in tensors if "lora_B" in key))


@pytest.mark.parametrize(
    ("lie", "failing", "said"),
    [
        (_zero_b, {"delta", "effect", "merge"}, "14 of 14 modules were not changed"),
        (_nan, {"finite"}, "holds NaN or infinity"),
        (_infinity, {"finite"}, "holds NaN or infinity"),
        (_wide, {"keys"}, r"lora_A.weight of shape \[4, 65\] does not match the base's 64 inputs"),
        (_other_rank, {"files"}, r"the rank 4, and the shape \[6, 64\] of its lora_A.weight has another"),
        (_renamed, {"keys"}, "none of its 28 tensors belongs to a module"),
        (_extra, {"keys"}, "1 of 29 tensors belong to no module.*layers.7"),
        (_extra_part, {"keys"}, "1 tensors would be ignored.*lora_C"),
        (_hostile_name, {"keys"}, "1 tensors would be ignored.*passwd"),
        (_lost, {"keys"}, "1 tensors are missing.*lora_B"),
    ],
)
def test_lies_are_caught_and_nothing_is_stored(base, adapter, lie, failing, said):
    change_tensors(adapter, lie)
    verification = verify(base, adapter)
    assert {check.name for check in verification.failures} == failing
    with pytest.raises((VerificationError, FileFormatError), match=said) as caught:
        import_adapter(adapter, base, name="liar", dtype="fp32")
    assert "\n" not in str(caught.value)
    assert Library().list() == ()


def test_files_that_cannot_be_read_fail_the_first_check(base, adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    verification = verify(base, adapter)
    assert [check.name for check in verification.failures] == ["files"]
    with pytest.raises(FileFormatError, match="truncated"):
        import_adapter(adapter, base, name="cut")


@pytest.mark.parametrize(
    ("options", "said"),
    [({"target_modules": ["nowhere"]}, "nowhere"), ({"use_dora": True}, "magnitude"), ({"bias": "some"}, "some")],
)
def test_a_configuration_that_does_not_fit_its_weights(base, adapter, options, said):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    verification = verify(base, adapter)
    assert said in check(verification, "keys").detail


def test_live_logits_are_compared(base, good):
    model = attach(base, good, dtype="fp32", trainable=True)
    model.train()
    probes = default_probes(load_tokenizer(base))
    live = live_probe_logits(model, probes)
    assert all(module.training for module in model.modules())
    assert check(verify(base, good, probes=probes, live_logits=live), "reload").value == 0.0
    with model.disable_adapter():
        bare = live_probe_logits(model, probes)
    weaker = [logits - 0.1 * (logits - of_base) for logits, of_base in zip(live, bare, strict=True)]
    verification = verify(base, good, probes=probes, live_logits=weaker)
    assert [check.name for check in verification.failures] == ["reload"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_fp32_masters_over_a_16_bit_base_come_back_exactly(base, tiny_base_folder, tmp_path, dtype):
    from peft import LoraConfig, get_peft_model

    from haori.bases import load_model

    config = LoraConfig(
        r=4, target_modules="all-linear", modules_to_save=["input_layernorm"], trainable_token_indices=[3, 4]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = get_peft_model(load_model(base, dtype=dtype), config)
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * parameter.data.new_tensor(range(parameter.numel())).sin().view_as(parameter)
    masters = [p for name, p in live.named_parameters() if "lora_" in name]
    assert masters and all(p.dtype.itemsize == 4 for p in masters)
    live.train()
    probes = default_probes(load_tokenizer(base))
    logits = live_probe_logits(live, probes)
    folder = save_stock(live, tmp_path / "adapter")
    verification = verify_adapter(base, folder, dtype=dtype, probes=probes, live_logits=logits)
    require_passed(verification)
    assert verification.dtype == dtype
    assert check(verification, "reload").value == 0.0


def test_prompts_must_be_rendered_alike(base, good):
    assert check(verify(base, good, prompt_pair=([1, 2, 3], [1, 2, 3])), "prompt").passed
    verification = verify(base, good, prompt_pair=([1, 2, 3], [1, 2, 4, 3]))
    assert not verification.passed
    assert "from token 2 on (3 and 4 tokens)" in check(verification, "prompt").detail


def test_attach_refuses_another_structure(base, good, tmp_path):
    other = find_base(str(build_tiny_base(tmp_path / "deeper", layers=3)))
    card = draft_card(good, base.reference(), origin="trained")
    with pytest.raises(MismatchError) as caught:
        attach(other, good, card=card, allow_different_weights=True)
    for part in (base.fingerprint.id, other.fingerprint.id, repr(base.name), "'deeper'", "LlamaForCausalLM"):
        assert part in str(caught.value)


def test_attach_needs_permission_for_other_weights(base, good, tmp_path):
    other = find_base(str(build_tiny_base(tmp_path / "twin", seed=5)))
    card = draft_card(good, base.reference(), origin="trained")
    with pytest.raises(MismatchError, match="--allow-different-weights"):
        attach(other, good, card=card)
    assert attach(other, good, card=card, allow_different_weights=True).peft_config["default"].r == 4


def test_the_card_in_the_folder_is_believed(base, good, tmp_path):
    stored = import_adapter(good, base, name="good", dtype="fp32")
    other = find_base(str(build_tiny_base(tmp_path / "twin", seed=5)))
    with pytest.raises(MismatchError, match="'good@1'"):
        attach(other, stored.path)
    with pytest.raises(MismatchError, match="'good@1'"):
        import_adapter(stored.path, other, name="again")
    with pytest.raises(MismatchError, match="'good@1'"):
        merge_adapter(other, stored.path, tmp_path / "out")


def test_an_adapter_of_another_shape_is_refused_without_a_card(good, tmp_path):
    other = find_base(str(build_tiny_base(tmp_path / "shallow", layers=1)))
    with pytest.raises(MismatchError, match="14 of 28 tensors belong to no module"):
        attach(other, good)


def test_a_quantised_base_is_not_merged_into(base, good, tmp_path):
    import dataclasses

    component = dataclasses.replace(base.components["model"], quantization="bitsandbytes nf4")
    quantised = dataclasses.replace(base, components={"model": component})
    with pytest.raises(BaseError, match=r"quantised \(bitsandbytes nf4\)"):
        merge_adapter(quantised, good, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert check(verify(quantised, good), "merge").detail.startswith("skipped: the base is quantised")


def test_merge_refuses_before_work(base, good, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="not an empty folder"):
        merge_adapter(base, good, tmp_path / "full")
    with pytest.raises(InputError, match="not in 'fp32'"):
        merge_adapter(base, good, tmp_path / "out", dtype="fp32")


def test_merging_an_adapter_without_effect_leaves_nothing(base, adapter, tmp_path):
    change_tensors(adapter, _zero_b)
    with pytest.raises(VerificationError, match="exactly what the base does"):
        merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_methods_that_cannot_be_merged_are_skipped_with_a_reason(base, tiny_base_folder, tmp_path):
    from peft import PromptTuningConfig

    config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    folder = save_stock(stock_model(tiny_base_folder, config, scale=0.5), tmp_path / "prompt")
    verification = verify(base, folder)
    assert verification.passed
    assert "adds no weights that could be merged" in check(verification, "merge").detail
    assert check(verification, "delta").detail.startswith("skipped")
    with pytest.raises(MismatchError, match="PROMPT_TUNING"):
        merge_adapter(base, folder, tmp_path / "out")


def test_an_activated_lora_is_probed_after_its_invocation(base, tiny_base_folder, tmp_path):
    folder = stock_lora(tiny_base_folder, tmp_path / "alora", alora_invocation_tokens=[20, 21])
    verification = verify(base, folder)
    assert verification.passed, verification.failures
    assert check(verification, "merge").detail.startswith("skipped: PEFT cannot merge")


def test_import_records_what_it_found(base, good):
    stored = import_adapter(good, base, name="good", licence="cc-by-4.0", description="mine", dtype="fp32")
    card = stored.card
    assert (card.origin, card.method, card.rank, card.alpha) == ("added", "lora", 4, 8.0)
    assert card.base == base.reference()
    assert card.verification is not None and card.verification.passed
    assert (card.licence, card.description) == ("cc-by-4.0", "mine")
    assert card.template_hash is not None and set(card.versions) == {"peft"}
    assert Library().get("good").card == card


def test_a_bad_name_is_refused_before_any_work(base, tmp_path):
    with pytest.raises(Exception, match="cannot be called"):
        import_adapter(tmp_path / "nowhere", base, name="bad name")


def test_weights_that_miss_a_target_are_refused(base, tmp_path):
    folder = written_adapter(tmp_path / "a", task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    verification = verify(base, folder)
    assert "tensors are missing" in check(verification, "keys").detail


def test_probes_hold_every_trained_token(tmp_path):
    from haori.library import adapter_probes, inspect_adapter

    tokens = [*range(300, 500), 7]
    files = inspect_adapter(written_adapter(tmp_path / "a", trainable_token_indices=tokens))
    given = [[1, 7, 2], [3, 4]]
    probes = adapter_probes(files, given)
    assert probes[:2] == given and {*tokens} <= {token for probe in probes for token in probe}
    assert all(probe[-2:] == [3, 4] and len(probe) <= 66 for probe in probes[2:])
    assert adapter_probes(files, probes) == probes  # they have it all
