"""Model folders: what is read from them, what is refused, and what their fingerprint depends on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from haori.bases.fingerprint import chat_template_of, fingerprint_folder
from haori.bases.folder import read_model_folder
from haori.core.errors import BaseError, FileFormatError, InputError
from haori.core.hashing import hash_parts


@pytest.fixture
def folder(tiny_base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def print_of(folder: Path):
    return fingerprint_folder(read_model_folder(folder))


def test_the_facts_of_a_folder(tiny_base_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    facts = read_model_folder(tiny_base_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder)
    assert facts.architecture == "LlamaForCausalLM"
    assert facts.parameters == model.num_parameters()
    assert facts.size_bytes == (tiny_base_folder / "model.safetensors").stat().st_size
    assert facts.context_length == 256
    assert facts.quantization is None


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 77}}, 77),
        ({}, 2048),
        ({"max_position_embeddings": None}, 2048),
    ],
)
def test_context_length(folder: Path, config: dict[str, Any], length: int) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": ["X"], **config}))
    assert read_model_folder(folder).context_length == length


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq-4bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes-4bit"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_quantization(folder: Path, section: dict[str, Any], name: str) -> None:
    edit(folder / "config.json", lambda config: config.update(quantization_config=section))
    assert read_model_folder(folder).quantization == name


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": [')


def _list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def _no_architecture(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.pop("architectures"))


def _custom_code(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(auto_map={"AutoModel": "evil.Model"}))


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _pickle_in_disguise(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x80\x04\x95" + b"x" * 100)


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))


def _escaping_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "out.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../out.safetensors"}}))


def _gguf_inside(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "x.gguf").write_bytes(b"GGUF")


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (_no_config, BaseError, "no config.json"),
        (_adapter, BaseError, "haori library add"),
        (_broken_config, FileFormatError, "not valid JSON"),
        (_list_config, FileFormatError, "JSON object"),
        (_no_architecture, BaseError, "names no architecture"),
        (_custom_code, BaseError, "auto_map"),
        (_no_weights, BaseError, "holds no weights"),
        (_pickle, BaseError, "pickle"),
        (_pickle_in_disguise, FileFormatError, "pickle"),
        (_truncated, FileFormatError, "truncated"),
        (_missing_shard, FileFormatError, "missing"),
        (_escaping_shard, FileFormatError, "not allowed"),
        (_gguf_inside, BaseError, "x.gguf"),
    ],
)
def test_bad_folders_are_refused(
    folder: Path, spoil: Callable[[Path], None], kind: type[InputError], words: str
) -> None:
    spoil(folder)
    with pytest.raises(kind, match=words):
        read_model_folder(folder)


def test_shards_have_the_structure_of_one_file(tiny_base_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_base_folder).save_pretrained(tmp_path, max_shard_size="50KB")
    facts = read_model_folder(tmp_path)
    assert len(facts.weight_files) > 1
    assert facts.tensors == read_model_folder(tiny_base_folder).tensors
    assert print_of(tmp_path).structure == print_of(tiny_base_folder).structure


def test_noise_does_not_change_the_fingerprint(folder: Path) -> None:
    before = print_of(folder)
    (folder / "README.md").write_text("# New words")
    (folder / "extra.safetensors").write_bytes(b"not read")
    edit(folder / "config.json", lambda config: config.update(transformers_version="9.9"))
    edit(folder / "tokenizer_config.json", lambda config: config.update(is_local=False, backend="other"))
    edit(folder / "tokenizer.json", lambda document: document.update(version="2.0", truncation={"max_length": 8}))
    assert print_of(folder) == before


def test_weights_change_the_fingerprint(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    before = print_of(folder)
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] += 1e-3
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    after = print_of(folder)
    assert before.compare(after) == "other weights"
    assert after.with_fields(weights=before.weights) == before


def test_shape_and_architecture_change_the_structure(folder: Path, tiny_base_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    before = print_of(tiny_base_folder)
    edit(folder / "config.json", lambda config: config.update(architectures=["MistralForCausalLM"]))
    assert before.compare(print_of(folder)) == "other structure"
    shutil.copy(tiny_base_folder / "config.json", folder)
    assert print_of(folder) == before
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"][:-1].clone()
    save_file(state, folder / "model.safetensors")
    assert before.compare(print_of(folder)) == "other structure"


def test_tokenizer_changes_are_seen(folder: Path) -> None:
    before = print_of(folder)
    edit(folder / "tokenizer.json", lambda document: document["model"]["merges"].pop())
    fewer_merges = print_of(folder).tokenizer
    edit(folder / "tokenizer_config.json", lambda config: config.update(eos_token="<|endoftext|>"))
    other_end = print_of(folder).tokenizer
    assert len({before.tokenizer, fewer_merges, other_end}) == 3


def test_merges_are_the_same_in_both_spellings(folder: Path) -> None:
    before = print_of(folder)

    def respell(document: dict[str, Any]) -> None:
        merges = document["model"]["merges"]
        assert isinstance(merges[0], list)
        document["model"]["merges"] = [" ".join(pair) for pair in merges]
        document["model"].pop("ignore_merges")

    edit(folder / "tokenizer.json", respell)
    assert print_of(folder) == before


def test_a_folder_without_tokenizer_has_no_tokenizer_hash(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert print_of(folder).tokenizer is None
    (folder / "vocab.txt").write_text("a\nb\n")
    assert print_of(folder).tokenizer is not None


def test_the_template_hash_is_that_of_the_loaded_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    assert print_of(folder).chat_template == hash_parts([AutoTokenizer.from_pretrained(folder).chat_template])
    # A template in the configuration counts when there is no file; the file wins when there are both.
    edit(folder / "tokenizer_config.json", lambda config: config.update(chat_template="{{ 'other' }}"))
    assert chat_template_of(folder) == AutoTokenizer.from_pretrained(folder).chat_template != "{{ 'other' }}"
    (folder / "chat_template.jinja").unlink()
    assert chat_template_of(folder) == AutoTokenizer.from_pretrained(folder).chat_template == "{{ 'other' }}"
    named = [{"name": "default", "template": "{{ 'd' }}"}, {"name": "tool_use", "template": "{{ 't' }}"}]
    edit(folder / "tokenizer_config.json", lambda config: config.update(chat_template=named))
    assert chat_template_of(folder) == AutoTokenizer.from_pretrained(folder).chat_template["default"]
    edit(folder / "tokenizer_config.json", lambda config: config.pop("chat_template"))
    assert print_of(folder).chat_template is None
