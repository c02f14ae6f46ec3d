"""What a refusal says can be done is done, on a real adapter of its kind."""

import json
import re
import shutil
import warnings

import peft
import pytest
from peft.tuners.lora import config as lora_config

from haori.bases import find_base
from haori.core.errors import HaoriError, InputError
from haori.core.settings import settings
from haori.library import Library, import_adapter, inspect_adapter, merge_adapter
from haori.serve.adapters.refusals import refuse_unsupported
from tests.command_line import haori
from tests.library_samples import save_stock, stock_lora, stock_model, written_adapter
from tests.parity.test_serve_adapter_weights import StateDict, read

TASK = {"task_type": "CAUSAL_LM"}
TARGETS = ["q_proj", "v_proj"]


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **TASK, **options})


KINDS = {
    "boft": lambda: peft.BOFTConfig(target_modules=TARGETS, boft_block_size=4, **TASK),
    "c3a": lambda: peft.C3AConfig(target_modules=TARGETS, block_size=4, **TASK),
    "delora": lambda: peft.DeloraConfig(target_modules=TARGETS, r=4, **TASK),
    "hra": lambda: peft.HRAConfig(target_modules=TARGETS, r=4, **TASK),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["norm", "input_layernorm"], **TASK),
    "loha": lambda: peft.LoHaConfig(target_modules=TARGETS, r=4, **TASK),
    "lokr": lambda: peft.LoKrConfig(target_modules=TARGETS, r=4, **TASK),
    "miss": lambda: peft.MissConfig(target_modules=TARGETS, r=4, **TASK),
    "oft": lambda: peft.OFTConfig(target_modules=TARGETS, oft_block_size=4, **TASK),
    "randlora": lambda: peft.RandLoraConfig(target_modules=["q_proj"], r=4, **TASK),
    "road": lambda: peft.RoadConfig(target_modules=TARGETS, group_size=4, **TASK),
    "shira": lambda: peft.ShiraConfig(target_modules=TARGETS, r=4, **TASK),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[3, 5], target_modules=["embed_tokens"], **TASK),
    "vblora": lambda: peft.VBLoRAConfig(target_modules=["q_proj"], r=2, num_vectors=16, vector_length=4, **TASK),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4, save_projection=True, **TASK),
    "adaption": lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, **TASK),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, **TASK),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **TASK),
    "p_tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, **TASK),
    "activated": lambda: lora(alora_invocation_tokens=[5, 6]),
    "kasa": lambda: lora(kasa_config=lora_config.KasaConfig()),
    "monteclora": lambda: lora(monteclora_config=lora_config.MontecloraConfig()),
    "parameters": lambda: lora(target_modules=[], target_parameters=["q_proj.weight"]),
    "qalora": lambda: lora(use_qalora=True, qalora_group_size=4),
    "replicated": lambda: lora(layer_replication=[[0, 2], [1, 2]]),
    "velora": lambda: lora(velora_config=lora_config.VeloraConfig()),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "pissa_niter": lambda: lora(init_lora_weights="pissa_niter_4"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "fourierft": lambda: peft.FourierFTConfig(target_modules=TARGETS, n_frequency=20, **TASK),
    "bdlora": lambda: lora(use_bdlora=lora_config.BdLoraConfig(
        target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2
    )),
    # Refused for what is in the file.
    "embedding": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "head_saved": lambda: lora(modules_to_save=["lm_head"]),
    "embedding_saved": lambda: lora(modules_to_save=["embed_tokens"]),
}  # fmt: skip
TRAINED_AGAIN = {"fourierft", "bdlora"}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's, of how PEFT's SHiRA makes its update
@pytest.mark.parametrize("kind", KINDS)
def test_the_advice_of_a_refusal_works(tiny_base_folder, haori_home, tmp_path, capsys, kind):
    folder = save_stock(stock_model(tiny_base_folder, KINDS[kind](), scale=0.1), tmp_path / kind)
    base = find_base(str(tiny_base_folder))
    with pytest.raises(InputError) as caught:
        read(folder, StateDict(tiny_base_folder))
    sentence = str(caught.value)
    advised = set(re.findall(r"`haori ([a-z-]+)", sentence))
    if "merge" in advised:
        assert merge_adapter(base, folder, tmp_path / "merged").verification.passed
    if "chat" in advised:
        assert {"chat", "generate-text"} == advised
        import_adapter(folder, base, name="a", dtype="fp32")
        done = haori(capsys, "generate-text", "a", "--prompt", "hello", "--max-tokens", 3)
        assert done.code == 0, done.err
        with pytest.raises(InputError):
            merge_adapter(base, folder, tmp_path / "merged")
    assert bool(advised) or "path_initial_model" in sentence or kind in TRAINED_AGAIN, sentence
    assert (kind in TRAINED_AGAIN) == ("Train it again" in sentence)


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
def test_a_start_that_changed_the_base_can_be_saved_as_a_plain_lora(tiny_base_folder, tmp_path, start):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = stock_model(tiny_base_folder, lora(init_lora_weights=start), scale=0.0)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = start
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data += 0.1 * parameter.data.new_tensor(range(parameter.numel())).sin().view_as(parameter)
        model.save_pretrained(tmp_path / "raw")
        with pytest.raises(InputError, match="path_initial_model_for_weight_conversion"):
            refuse_unsupported(inspect_adapter(tmp_path / "raw"), "'a'")
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert read(tmp_path / "plain", StateDict(tiny_base_folder)).updates


@pytest.mark.parametrize("start", ["corda", "lora_ga", "loftq"])
def test_a_start_that_cannot_be_found_again_is_not_to_be_merged(tmp_path, start):
    files = inspect_adapter(written_adapter(tmp_path / "a", init_lora_weights=start))
    with pytest.raises(InputError) as caught:
        refuse_unsupported(files, "'a'")
    assert "haori merge" not in str(caught.value)
    assert ("Train it again" in str(caught.value)) == (start == "loftq")


def test_a_tensor_that_peft_would_ignore_is_not_to_be_merged(tiny_base_folder, haori_home, tmp_path):
    from tests.library_samples import change_tensors

    def add(tensors):
        key = next(key for key in tensors if key.endswith("q_proj.lora_A.weight"))
        tensors[key.replace("lora_A", "lora_C")] = tensors[key].clone()

    folder = change_tensors(stock_lora(tiny_base_folder, tmp_path / "a"), add)
    with pytest.raises(InputError, match="PEFT would ignore its tensor") as caught:
        read(folder, StateDict(tiny_base_folder))
    assert "haori merge" not in str(caught.value)
    with pytest.raises(HaoriError):
        merge_adapter(find_base(str(tiny_base_folder)), folder, tmp_path / "merged")


def test_a_damaged_base_can_be_removed_and_added_again(tiny_base_folder, haori_home, tmp_path, capsys):
    assert haori(capsys, "bases", "add", tiny_base_folder, "--name", "mine").code == 0
    (settings().bases / "mine" / "base.json").write_text("{")
    done = haori(capsys, "bases", "show", "mine")
    assert done.code == 2 and "`haori bases remove mine`" in done.err, done.err
    assert haori(capsys, "bases", "remove", "mine").code == 0
    assert haori(capsys, "bases", "add", tiny_base_folder, "--name", "mine").code == 0
    assert haori(capsys, "bases", "show", "mine").code == 0


def test_a_library_without_a_folder_or_with_a_damaged_card_can_be_rebuilt(
    tiny_base_folder, haori_home, tmp_path, capsys
):
    base = find_base(str(tiny_base_folder))
    gone = import_adapter(stock_lora(tiny_base_folder, tmp_path / "a", seed=1), base, name="gone", dtype="fp32")
    kept = import_adapter(stock_lora(tiny_base_folder, tmp_path / "b", seed=2), base, name="kept", dtype="fp32")
    bad = import_adapter(stock_lora(tiny_base_folder, tmp_path / "c", seed=3), base, name="bad", dtype="fp32")
    shutil.rmtree(gone.path)
    (bad.path / "card.json").write_text(json.dumps({"id": 1}))
    done = haori(capsys, "library", "show", "gone")
    assert done.code == 2 and "`haori library rebuild`" in done.err
    done = haori(capsys, "library", "show", "bad")
    assert done.code == 2 and "restore it or remove its folder" in done.err
    shutil.rmtree(bad.path)
    assert haori(capsys, "library", "rebuild").code == 0
    assert [stored.name for stored in Library().list()] == [kept.name]


def test_an_adapters_folder_is_no_base_and_can_be_added_to_the_library(tiny_base_folder, haori_home, tmp_path, capsys):
    folder = stock_lora(tiny_base_folder, tmp_path / "a")
    done = haori(capsys, "bases", "add", folder)
    assert done.code == 2 and "`haori library add`" in done.err
    done = haori(capsys, "library", "add", folder, "--base", tiny_base_folder, "--name", "a")
    assert done.code == 0, done.err
