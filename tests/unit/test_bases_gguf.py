"""GGUF: a tiny Llama written as llama.cpp would, converted back and compared with the model it was made from."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from haori import bases
from haori.core.errors import BaseError, FileFormatError

HEADS, KV_HEADS = 4, 2
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTER = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of a query or key projection as llama.cpp's rotary embedding expects them."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    folder: Path, out: Path, *, pre: str = "default", architecture: str = "llama", spoil: bool = False
) -> Path:
    """Write the tiny base in `folder` as GGUF in 32 bits."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(out, architecture)
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(config["hidden_size"] // HEADS)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in special else 1 for token, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    for name, weight in load_file(folder / "model.safetensors").items():
        if name in OUTER:
            writer.add_tensor(OUTER[name], weight)
            continue
        _, _, layer, rest = name.split(".", 3)
        inner = NAMES[rest.removesuffix(".weight")]
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(inner)
        values = interleave(weight, heads) if heads else weight
        if spoil and inner == "ffn_up":
            values = np.full_like(values, np.nan)
        writer.add_tensor(f"blk.{layer}.{inner}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(scope="module")
def file(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_base_folder, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_converted_model_is_the_model_it_was_made_from(file: Path, tiny_base_folder: Path, haori_home: Path) -> None:
    base, original = bases.find_base(str(file)), bases.find_base(str(tiny_base_folder))
    assert (base.name, base.source, base.licence) == ("tiny", f"gguf:{file}", "Apache-2.0")
    assert base.context_length == 256
    assert base.quantization is None
    assert base.fingerprint.structure == original.fingerprint.structure
    assert base.fingerprint.chat_template == original.fingerprint.chat_template
    ours = bases.load_model(base, dtype="fp32", device="cpu")
    theirs = bases.load_model(original, dtype="fp32", device="cpu")
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    assert ours.config.rms_norm_eps == theirs.config.rms_norm_eps
    ids = torch.tensor([[1, 40, 50, 60, 2]])
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    text = "<|im_start|>user\nIs this 12  reviews?\n日本 🎌<|im_end|>\n"
    left, right = bases.load_tokenizer(base), bases.load_tokenizer(original)
    assert left(text).input_ids == right(text).input_ids
    assert left.decode(left(text).input_ids) == text
    assert (left.pad_token, left.eos_token, left.bos_token) == (right.pad_token, right.eos_token, right.bos_token)
    assert str(haori_home / "cache") in str(base.path)


def test_conversion_happens_once_per_content(file: Path, tmp_path: Path) -> None:
    first = bases.find_base(str(file))
    stamp = (first.path / "model.safetensors").stat().st_mtime_ns
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(file.read_bytes())
    again = bases.find_base(str(copy))
    assert again.path == first.path
    assert (again.path / "model.safetensors").stat().st_mtime_ns == stamp
    assert (again.name, again.fingerprint) == ("copy", first.fingerprint)


def test_a_registered_gguf_is_a_copy_that_remove_deletes(file: Path, tmp_path: Path, haori_home: Path) -> None:
    original = tmp_path / "mine.gguf"
    original.write_bytes(file.read_bytes())
    added = bases.add_base(str(original))
    assert (added.name, added.path) == ("mine", haori_home / "bases" / "mine" / "model")
    original.unlink()
    assert bases.find_base("mine") == added
    bases.remove_base("mine")
    assert not list((haori_home / "bases").iterdir())


def test_digits_are_split_where_the_vocabulary_says_so(tiny_base_folder: Path, tmp_path: Path) -> None:
    pieces = {}
    for pre in ("default", "smollm"):
        path = write_gguf(tiny_base_folder, tmp_path / f"{pre}.gguf", pre=pre)
        tokenizer = bases.load_tokenizer(bases.find_base(str(path)))
        pieces[pre] = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")]
    assert pieces == {"default": ["a", "Ġ", "Ġ12"], "smollm": ["a", "ĠĠ", "1", "2"]}


def test_an_unknown_architecture_is_named(tiny_base_folder: Path, tmp_path: Path, haori_home: Path) -> None:
    path = write_gguf(tiny_base_folder, tmp_path / "x.gguf", architecture="futurenet")
    with pytest.raises(BaseError, match="is a futurenet model, which transformers cannot read from GGUF"):
        bases.find_base(str(path))
    assert not [p for p in (haori_home / "cache").rglob("*") if p.is_file() and "hashes" not in p.parts]


def test_weights_that_are_not_numbers_are_refused(tiny_base_folder: Path, tmp_path: Path) -> None:
    path = write_gguf(tiny_base_folder, tmp_path / "x.gguf", spoil=True)
    with pytest.raises(FileFormatError, match=r"NaN or infinity in the weight 'model\.layers\.0\.mlp\.up_proj"):
        bases.find_base(str(path))


@pytest.mark.parametrize("keep", [4, 20, 60, 3000, 0.7, -1])
def test_truncated_files_are_refused(file: Path, tmp_path: Path, haori_home: Path, keep: float) -> None:
    data = file.read_bytes()
    path = tmp_path / "short.gguf"
    path.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    for use in (bases.find_base, bases.add_base):
        with pytest.raises(FileFormatError, match="cannot be read as GGUF; it is truncated or malformed"):
            use(str(path))
    assert not [p for p in haori_home.rglob("*") if p.is_file() and "hashes" not in p.parts]


def test_a_header_that_claims_too_much_is_refused(file: Path, tmp_path: Path) -> None:
    data = bytearray(file.read_bytes())
    data[8:24] = b"\xff" * 16
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(FileFormatError, match="truncated or malformed"):
        bases.find_base(str(tmp_path / "x.gguf"))


def test_another_file_is_not_taken_for_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 something else")
    for use in (bases.find_base, bases.add_base):
        with pytest.raises(BaseError, match="is a file but neither GGUF nor a checkpoint"):
            use(str(tmp_path / "x.gguf"))
