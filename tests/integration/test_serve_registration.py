"""An adapter that no request could be answered with gets no name: not from a folder, not from the library."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

from haori.bases import find_base
from haori.core.errors import HaoriError, InputError
from haori.library import Library, adapter_id, draft_card, import_adapter, inspect_adapter, verify_adapter
from haori.serve import AdapterDirectory, EmbedderLimits, EngineLimits, open_embedder, open_engine
from tests.classifier_adapters import stock_classifier
from tests.encoder_models import build_tiny_encoder, stock_encoder
from tests.library_samples import change_tensors, save_stock, stock_lora, stock_model
from tests.server_samples import served

FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def without(part):
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if part in key]


def with_value(part, value):
    def change(tensors):
        next(tensor for key, tensor in tensors.items() if part in key)[0, 0] = value

    return change


def as_type(dtype):
    return lambda tensors: tensors.update({key: value.to(dtype) for key, value in tensors.items()})


def beside(tensors):
    """Add an update of a module that the configuration does not adapt."""
    for part in ("A", "B"):
        key = f"{FIRST}.lora_{part}.weight"
        tensors[key.replace("q_proj", "o_proj")] = tensors[key].clone()


def other_rank(tensors):
    tensors[f"{FIRST}.lora_A.weight"] = torch.ones(6, 64)
    tensors[f"{FIRST}.lora_B.weight"] = torch.ones(64, 6)


def wide(tensors):
    tensors[f"{FIRST}.lora_A.weight"] = torch.ones(4, 65)


def silent(tensors):
    tensors.update({key: value * 0 for key, value in tensors.items() if "lora_B" in key})


def moved(tensors):
    for key in list(tensors):
        tensors[key.replace("layers.1", "layers.7")] = tensors.pop(key)


# What is done to a good adapter's tensors, and what is said then.
BROKEN_FILES = {
    "nan": (with_value("lora_A", float("nan")), "NaN or infinity"),
    "infinity": (with_value("lora_B", float("-inf")), "NaN or infinity"),
    "missing_factor": (without("layers.1.self_attn.v_proj.lora_B"), "one of the two factors"),
    "missing_module": (without("layers.1.self_attn.v_proj"), "adapts 'model.layers.1.self_attn.v_proj'"),
    "missing_layer": (without("layers.1."), "adapts 'model.layers.1.self_attn.q_proj'"),
    "beside": (beside, "does not adapt 'model.layers.0.self_attn.o_proj'"),
    "other_rank": (other_rank, "the rank 4"),
    "wide": (wide, "65"),
    "other_layer": (moved, "no module 'model.layers.7"),
    "whole_numbers": (as_type(torch.int32), "floats"),
    "silent": (silent, "does nothing"),
}
# What is put into a good adapter's configuration, as JSON.
BROKEN_CONFIGS = {
    "infinite_rank": ('"r": 1e999', "whole number"),
    "rank_with_point": ('"r": 4.0', "whole number"),
    "negative_rank": ('"r": -4', "whole number"),
    "true_rank": ('"r": true', "whole number"),
    "higher_rank": ('"r": 8', "the rank 8"),
    "alpha_in_quotes": ('"lora_alpha": "16"', "without quotation marks"),
    "nan_alpha": ('"lora_alpha": NaN', "a number from 0"),
    "rank_of_one": ('"rank_pattern": {"q_proj": 4.0}', "whole number"),
    "alpha_of_one": ('"alpha_pattern": {"q_proj": -1e999}', "a number from 0"),
    "fewer_targets": ('"target_modules": ["q_proj"]', "does not adapt"),
    "more_targets": ('"target_modules": ["q_proj", "v_proj", "o_proj"]', "file holds nothing"),
    "more_layers": ('"layers_to_transform": [0]', "does not adapt 'model.layers.1"),
    "more_saved": ('"modules_to_save": ["norm"]', "saves 'model.layers.0.input_layernorm.weight' whole"),
    "dora": ('"use_dora": true', "magnitude vector"),
    "replicated": ('"layer_replication": [[0, 1], [0, 1]]', "layer"),
}
OTHER_KINDS = {
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p_tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "alora": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], alora_invocation_tokens=[5, 6]),
}


@pytest.fixture(scope="module")
def good(tiny_base_folder, tmp_path_factory) -> Path:
    return stock_lora(tiny_base_folder, tmp_path_factory.mktemp("adapter") / "good")


@pytest.fixture
def base(tiny_base_folder):
    return find_base(str(tiny_base_folder))


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def broken(kind: str, good: Path, folder: Path) -> tuple[Path, str]:
    shutil.copytree(good, folder)
    if kind in BROKEN_FILES:
        change, said = BROKEN_FILES[kind]
        return change_tensors(folder, change), said
    field, said = BROKEN_CONFIGS[kind]
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config.pop(next(iter(json.loads(f"{{{field}}}"))))
    path.write_text(json.dumps(config)[:-1] + f", {field}}}")
    return folder, said


@contextmanager
def serving(base, root, home):
    directory = AdapterDirectory(Library(), base.reference(), base_names=[base.name], roots=[root])
    limits = EngineLimits(base.context_length, running=4, waiting=8)
    engine = open_engine(base, directory.files, limits, weights="fp32", cache_bytes=8 << 20)
    with served(engine, directory, home=home) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def load(client, path, name="x"):
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})


def listed(client):
    return [model["id"] for model in client.get("/v1/models").json()["data"]]


def test_no_broken_folder_gets_a_name(base, good, root, haori_home, tmp_path):
    """Each is refused here with its reason, and by `library add` too, but for what only the server cannot do."""
    with serving(base, root, tmp_path) as client:
        for kind in (*BROKEN_FILES, *BROKEN_CONFIGS):
            folder, said = broken(kind, good, root / kind)
            reply = load(client, kind)
            assert reply.status_code == 400, (kind, reply.text)
            sentence = reply.json()["error"]["message"]
            assert said in sentence and str(root) not in sentence, (kind, sentence)
            assert reply.json()["error"]["code"] == "adapter_refused"
            assert listed(client) == [base.name]
            assert not verify_adapter(base, folder, dtype="fp32").passed or kind == "replicated", kind
        assert load(client, shutil.copytree(good, root / "good")).status_code == 200
        asked = {"model": "x", "prompt": "a", "max_tokens": 2}
        assert client.post("/v1/completions", json=asked).status_code == 200


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_kind_that_is_not_served_gets_no_name_from_the_library_either(
    base, tiny_base_folder, root, haori_home, tmp_path, kind
):
    folder = save_stock(stock_model(tiny_base_folder, OTHER_KINDS[kind], scale=0.3), root / kind)
    import_adapter(folder, base, name="stored", dtype="fp32")
    with serving(base, root, tmp_path) as client:
        for path in (kind, "stored", "stored@1"):
            reply = load(client, path)
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "adapter_refused"), reply.text
        assert "x" not in listed(client)


def test_a_refused_replacement_leaves_the_name_as_it_was(base, good, root, haori_home, tmp_path):
    shutil.copytree(good, root / "good")
    broken("nan", good, root / "nan")
    with serving(base, root, tmp_path) as client:
        assert load(client, "good").status_code == 200
        asked = {"lora_name": "x", "lora_path": "nan", "load_inplace": True}
        assert client.post("/v1/load_lora_adapter", json=asked).status_code == 400
        reply = client.post("/v1/completions", json={"model": "x", "prompt": "a", "max_tokens": 2})
        assert reply.status_code == 200


def test_an_adapter_larger_than_the_memory_for_adapters(base, good, root, haori_home):
    directory = AdapterDirectory(Library(), base.reference(), base_names=[base.name], roots=[root])
    limits = EngineLimits(base.context_length, running=4, waiting=8, adapter_bytes=1000)
    engine = open_engine(base, directory.files, limits, weights="fp32", cache_bytes=8 << 20)
    shutil.copytree(good, root / "good")
    with pytest.raises(InputError, match="--adapter-memory"):
        directory.register("x", "good", engine.check_adapter)
    engine.close()


def test_files_put_into_the_library_by_hand_are_checked_at_the_request(base, good, root, haori_home, tmp_path):
    """The index does not read weights: what was exchanged beneath it is refused when it is asked for."""
    stored = import_adapter(good, base, name="stored", dtype="fp32")
    with serving(base, root, tmp_path) as client:
        assert listed(client) == [base.name, "stored", "stored@1"]
        for kind in ("missing_layer", "beside", "nan", "higher_rank"):
            folder, _ = broken(kind, good, tmp_path / kind)
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copyfile(folder / name, stored.path / name)
            reply = client.post("/v1/completions", json={"model": "stored", "prompt": "a", "max_tokens": 2})
            assert reply.status_code == 400, (kind, reply.text)
            assert str(tmp_path) not in reply.text and str(stored.path) not in reply.text


def test_a_card_of_another_base_beside_the_files(base, good, root, haori_home):
    folder = shutil.copytree(good, root / "good")
    reference = base.reference()
    fingerprint = reference.fingerprint.model_copy(update={"weights": "other"})
    other = reference.model_copy(update={"components": {"model": fingerprint}})
    (folder / "card.json").write_text(draft_card(folder, other, origin="trained").model_dump_json())
    directory = AdapterDirectory(Library(), base.reference(), base_names=[base.name], roots=[root])
    with pytest.raises(InputError, match="other weights"):
        directory.register("x", "good", lambda files, adapter: None)


def test_a_classifier_of_a_decoder_writes_no_text(base, root, haori_home, tmp_path):
    stock_classifier(base.path, root / "judge", labels=2, target_modules=["q_proj"])
    with serving(base, root, tmp_path) as client:
        reply = load(client, "judge")
        assert reply.status_code == 400, reply.text
        assert "served over encoders, by /classify. `haori classify` answers" in reply.json()["error"]["message"]
        assert listed(client) == [base.name]


def test_over_an_encoder(tmp_path, root, haori_home):
    base = find_base(str(build_tiny_encoder(tmp_path / "encoder")))
    folder = stock_encoder(base.path, root / "good", target_modules=["query", "value"])
    directory = AdapterDirectory(Library(), base.reference(), base_names=[base.name], roots=[root])
    embedder = open_embedder(base, directory.files, EmbedderLimits(64))
    for number, change in enumerate((without("layer.1."), with_value("lora_A", float("nan")), without("query.lora_B"))):
        change_tensors(Path(shutil.copytree(folder, root / f"{number}")), change)
        with pytest.raises(HaoriError, match=r"holds nothing|NaN|two factors"):
            directory.register("x", f"{number}", embedder.check_adapter)
    directory.register("x", "good", embedder.check_adapter)
    assert directory.resolve("x").mix == ((adapter_id(inspect_adapter(folder)), 1.0),)
    embedder.close()
