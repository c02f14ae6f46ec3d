"""kohya's format: genuine files, LyCORIS's kinds as its own forward applies them, round trips, metadata, refusals."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from haori.core.errors import FileFormatError, InputError
from haori.core.records import AdapterCard, BaseReference
from haori.core.safetensors_header import read_safetensors_header
from haori.library.formats.format import open_source
from haori.library.formats.kohya_metadata import kohya_metadata
from haori.library.formats.registry import format_named, format_of, read_updates
from haori.library.updates import AdapterUpdates, ModuleUpdate
from tests.update_samples import module_updates

FIXTURES = Path(__file__).parents[1] / "fixtures" / "image_adapters"
KOHYA = format_named("kohya")
Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q"


def write(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata or None)
    return path


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", ["kohya_sd15_r8_a4", "lycoris_sd15_loha_r4_a2"])
def test_genuine_files_change_weights_as_their_tools_said(name: str) -> None:
    updates = read_updates(FIXTURES / f"{name}.safetensors")
    expected = load_file(FIXTURES / f"{name}.expected.safetensors")
    assert (updates.format, updates.family) == ("kohya", "sd15")
    for key, change in expected.items():
        found = updates.modules[key.removesuffix(".weight")].delta()
        assert error(found.reshape(change.shape), change) < 1e-5, key


def test_the_weights_that_a_genuine_dora_file_implies_are_as_torch_initialises_linear_layers() -> None:
    """Rows of W + dW point where rows of dW - change do, with norm m, so W follows from file and change up to signs.

    Linear layers begin uniform in +-1 / sqrt(in); a wrong scale, axis or magnitude gives other values.
    """
    updates = read_updates(FIXTURES / "lycoris_sd15_dora_r4_a4.safetensors")
    expected = load_file(FIXTURES / "lycoris_sd15_dora_r4_a4.expected.safetensors")
    for key, change in expected.items():
        if not key.startswith("unet."):
            continue
        update = updates.modules[key.removesuffix(".weight")]
        assert update.magnitude is not None
        direction = update.delta() - change.double()
        changed = update.magnitude.double() * direction / direction.norm(dim=1, keepdim=True)
        either = torch.stack([changed - change, -changed - change])  # [2, out, in]
        smaller = either.abs().amax(2).argmin(0)
        weight = either[smaller, torch.arange(len(change))]
        bound = change.shape[1] ** -0.5
        assert float(weight.abs().max()) < 1.001 * bound
        assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
        assert error(update.change(weight), change) < 1e-5


@pytest.mark.parametrize("name", ["lycoris_kinds", "lycoris_rs_lora"])
def test_every_kind_of_lycoris_changes_weights_as_its_forward_does(name: str) -> None:
    updates = read_updates(FIXTURES / f"{name}.safetensors")
    expected = load_file(FIXTURES / f"{name}.expected.safetensors")
    modules = sorted(key.removesuffix(".change") for key in expected if key.endswith(".change"))
    assert sorted(updates.modules) == [f"unet.{module}" for module in modules]
    assert {update.kind for update in updates.modules.values()} == {"lora", "loha", "lokr"}
    for module in modules:
        change = expected[f"{module}.change"]
        found = updates.modules[f"unet.{module}"].change(expected[f"{module}.weight"].double())
        assert error(found, change) < 1e-5, module


def test_what_the_forward_of_lycoris_covers() -> None:
    updates = read_updates(FIXTURES / "lycoris_kinds.safetensors").modules.values()
    assert {name for update in updates for name in update.factors} >= {"mid", "t1", "t2", "w1", "w1_a", "w2", "w2_a"}
    assert {update.magnitude.shape[0] == 1 for update in updates if update.magnitude is not None} == {True, False}


@settings(max_examples=40, deadline=None)
@given(update=module_updates(), place=st.sampled_from(["linear", "conv"]), family=st.sampled_from(["sd15", "sdxl"]))
def test_a_round_trip_changes_nothing(tmp_path_factory: Any, update: ModuleUpdate, place: str, family: str) -> None:
    module = (
        "unet.down_blocks.1.resnets.0.conv1" if place == "conv" else "text_encoder.text_model.encoder.layers.1.mlp.fc1"
    )
    path = tmp_path_factory.mktemp("round") / "a.safetensors"
    KOHYA.write(AdapterUpdates({module: update}, family=family), path)
    found = read_updates(path).modules
    assert list(found) == [module]
    assert_equal(found[module], update)


def assert_equal(found: ModuleUpdate, update: ModuleUpdate) -> None:
    assert found.kind == update.kind
    assert torch.allclose(found.delta().flatten(), update.delta().flatten(), rtol=1e-6, atol=0)
    for name in ("magnitude", "bias"):
        mine, its = getattr(update, name), getattr(found, name)
        assert (mine is None) == (its is None)
        assert mine is None or torch.equal(mine.flatten(), its.flatten())
    if update.magnitude is not None and update.magnitude.dim() > 1:
        assert found.magnitude is not None and found.magnitude.shape == update.magnitude.shape


@pytest.mark.parametrize(
    ("end", "named"),
    [
        ("oft_blocks", "OFT or BOFT"), ("a1.weight", "GLoRA"), ("on_input", "IA3"), ("lambda_layer", "T-LoRA"),
        ("lora_sideways.weight", "lora_sideways.weight"), ("lora_down", "lora_down"),
    ],
)  # fmt: skip
def test_a_key_that_means_nothing_here_is_named(tmp_path: Path, end: str, named: str) -> None:
    tensors = {f"{Q}.lora_down.weight": torch.ones(2, 4), f"{Q}.lora_up.weight": torch.ones(4, 2)}
    path = write(tmp_path / "a.safetensors", {**tensors, f"{Q}.{end}": torch.ones(2, 2)})
    with pytest.raises(FileFormatError, match=named):
        read_updates(path)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"lora_down.weight": (2, 4)}, "B is missing"),
        ({"lora_down.weight": (2, 4), "lora_up.weight": (4, 3)}, "do not fit together"),
        ({"lora_down.weight": (2, 4), "lora_up.weight": (4, 2), "alpha": (2,)}, "is a single number"),
        ({"lora_down.weight": (2, 4), "lora_up.weight": (4, 2), "diff": (4, 4)}, "different kinds"),
        ({"lora_down.weight": (2, 4), "lora_up.weight": (4, 2), "lora_A.weight": (2, 4)}, "say the same"),
        ({"lora_down.weight": (2, 4), "lora_up.weight": (4, 2), "dora_scale": (3, 1)}, "magnitude of shape"),
        ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2)}, "w2_b is missing"),
        ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (5, 2), "hada_w2_b": (2, 4)}, "two halves"),
        ({"lokr_w1": (2, 2), "lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2), "lokr_w2": (2, 2)}, "what w1 is"),
        ({"alpha": ()}, "stands alone"),
        ({"lora_down.weight": (2, 4), "lora_up.weight": (4, 2), "diff_b": (3,)}, "bias of shape"),
        ({"lora_down.weight": (2, 4), "lora_up.weight": (4, 2, 3, 3)}, "not 1 x 1"),
        ({"lora_down.weight": (2,), "lora_up.weight": (4, 2)}, "A has the shape"),
        ({"lokr_w1": (2, 2, 2), "lokr_w2": (2, 2)}, "w1 has the shape"),
        ({"lokr_w1": (2, 2), "lokr_w2": (0, 2)}, "w2 has the shape"),
        ({"diff": ()}, "diff has the shape"),
    ],
)
def test_tensors_that_make_no_update_are_refused(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], reason: str
) -> None:
    path = write(tmp_path / "a.safetensors", {f"{Q}.{end}": torch.ones(shape) for end, shape in tensors.items()})
    with pytest.raises(FileFormatError, match=reason):
        KOHYA.read(open_source(path))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path, alpha: float) -> None:
    pair = {f"{Q}.lora_down.weight": torch.ones(2, 4), f"{Q}.lora_up.weight": torch.ones(4, 2)}
    with pytest.raises(FileFormatError, match=rf"attn2_to_q\.alpha' is {alpha}"):
        read_updates(write(tmp_path / "a.safetensors", {**pair, f"{Q}.alpha": torch.tensor(alpha)}))


def test_factors_of_whole_numbers_are_refused(tmp_path: Path) -> None:
    pair = {f"{Q}.lora_down.weight": torch.ones(2, 4, dtype=torch.int8), f"{Q}.lora_up.weight": torch.ones(4, 2)}
    with pytest.raises(FileFormatError, match="A is of dtype int8"):
        read_updates(write(tmp_path / "a.safetensors", pair))


def test_a_module_that_no_unet_has_is_named(tmp_path: Path) -> None:
    tensors = {f"{name}.{end}": torch.ones(2, 2) for name in (Q, "lora_unet_down_blocks_0_gate")
               for end in ("lora_down.weight", "lora_up.weight")}  # fmt: skip
    with pytest.raises(FileFormatError, match=r"lora_unet_down_blocks_0_gate.*1 of its 2"):
        read_updates(write(tmp_path / "a.safetensors", tensors))


def test_the_same_module_in_two_spellings_is_refused(tmp_path: Path) -> None:
    names = ("lora_unet_down_blocks_1_attentions_0_proj_in", "lora_unet_input_blocks_4_1_proj_in")
    tensors = {f"{name}.{end}": torch.ones(2, 2) for name in names for end in ("lora_down.weight", "lora_up.weight")}
    with pytest.raises(FileFormatError, match=r"are both the module 'unet.down_blocks.1.attentions.0.proj_in'"):
        read_updates(write(tmp_path / "a.safetensors", tensors))


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1", "lora_te3_encoder_block_0_q",
        "lora_transformer_transformer_blocks_0_attn_to_q", "lycoris_transformer_blocks_0_attn_to_q",
        "unet.mid_block.attentions.0.proj_in", "base_model.model.layers.0.self_attn.q_proj",
        "diffusion_model.double_blocks.0.img_attn.qkv",
    ],
)  # fmt: skip
def test_files_of_other_formats_are_left_to_them(tmp_path: Path, key: str) -> None:
    tensors = {f"{key}.lora_down.weight": torch.ones(2, 4), f"{key}.lora_up.weight": torch.ones(4, 2)}
    assert not KOHYA.detect(open_source(write(tmp_path / "a.safetensors", tensors)))


def test_both_spellings_of_clip_are_read_and_the_canonical_is_written(tmp_path: Path) -> None:
    pair = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2)}
    for path in ("text_model_encoder_layers_0_mlp_fc1", "encoder_layers_0_mlp_fc1"):
        file = write(tmp_path / "a.safetensors", {f"lora_te_{path}.{end}": tensor for end, tensor in pair.items()})
        updates = read_updates(file)
        assert list(updates.modules) == ["text_encoder.text_model.encoder.layers.0.mlp.fc1"]
        KOHYA.write(updates, tmp_path / "b.safetensors")
        assert "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha" in load_file(tmp_path / "b.safetensors")


def test_textual_inversion_vectors_go_along(tmp_path: Path) -> None:
    vector = {"bundle_emb.cat.string_to_param.*": torch.randn(2, 8)}
    pair = {f"{Q}.lora_down.weight": torch.ones(2, 4), f"{Q}.lora_up.weight": torch.ones(4, 2)}
    updates = read_updates(write(tmp_path / "a.safetensors", {**pair, **vector}))
    assert list(updates.extra) == list(vector)
    KOHYA.write(updates, tmp_path / "b.safetensors")
    assert torch.equal(read_updates(tmp_path / "b.safetensors").extra[next(iter(vector))], next(iter(vector.values())))


def sample(rank: int = 4) -> ModuleUpdate:
    return ModuleUpdate("lora", {"A": torch.randn(rank, 768), "B": torch.randn(320, rank)}, alpha=2.0)


def card(**fields: Any) -> AdapterCard:
    return AdapterCard(
        id="0" * 64, origin="trained", created="2026-03-01T10:00:00+00:00",
        base=BaseReference(name="dream", source="folder:/x", components={}, family="sd15"),
        components=("unet",), method="lora", **fields,
    )  # fmt: skip


def test_metadata_describe_the_file_and_hashes_are_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "cat.safetensors"
    modules = {f"unet.down_blocks.{block}.attentions.0.transformer_blocks.0.attn2.to_k": sample() for block in range(3)}
    filler = {"unet.conv_in": ModuleUpdate("diff", {"diff": torch.randn(320, 4, 3, 3, 40)})}  # over 1 MiB of data
    kept = {"ss_tag_frequency": '{"10_cat": {"cat": 3}}', "ss_network_dim": "77", "lora_adapter_metadata": "{}"}
    updates = AdapterUpdates({**modules, **filler}, kept)
    about = card(description="A cat.", licence="MIT", tags=("animal",), trigger_words=("sks cat", "purr"), seed=3)
    KOHYA.write(updates, path, about)
    header, data = read_safetensors_header(path), path.read_bytes()
    found = header.metadata
    whole = hashlib.sha256(data[header.data_start :]).hexdigest()
    assert len(data) > 0x110000
    assert found["sshs_model_hash"] == whole
    assert found["modelspec.hash_sha256"] == f"0x{whole}"
    assert found["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert found["ss_tag_frequency"] == kept["ss_tag_frequency"] and "lora_adapter_metadata" not in found
    assert (found["ss_network_dim"], found["ss_network_alpha"], found["ss_seed"]) == ("4", "2.0", "3")
    assert (found["ss_base_model_version"], found["ss_v2"], found["ss_output_name"]) == ("sd_v1", "False", "cat")
    assert found["ss_network_module"] == "lycoris.kohya"  # for the whole difference
    spec = {key.removeprefix("modelspec."): value for key, value in found.items() if key.startswith("modelspec.")}
    assert spec.pop("hash_sha256") and spec == {
        "sai_model_spec": "1.0.1", "architecture": "stable-diffusion-v1/lora", "implementation": "diffusers",
        "title": "cat", "date": "2026-03-01T10:00:00+00:00", "description": "A cat.", "license": "MIT",
        "tags": "animal", "trigger_phrase": "sks cat, purr",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("family", "predicts", "version", "architecture", "stated"),
    [
        ("sd15", "epsilon", "sd_v1", "stable-diffusion-v1/lora", "epsilon"),
        ("sd15", "v_prediction", "sd_v1_v", "stable-diffusion-v1/lora", "v"),
        ("sd2", "epsilon", "sd_v2", "stable-diffusion-v2-512/lora", "epsilon"),
        ("sd2", "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v/lora", "v"),
        ("sd15", "sample", "sd_v1", "stable-diffusion-v1/lora", None),
        ("sd15", None, "sd_v1", "stable-diffusion-v1/lora", None),
    ],
)
def test_what_the_base_predicts_is_stated_as_sd_scripts_and_modelspec_do(
    tmp_path: Path, family: str, predicts: str | None, version: str, architecture: str, stated: str | None
) -> None:
    width = {"sd15": 768, "sd2": 1024}[family]
    update = ModuleUpdate("lora", {"A": torch.randn(4, width), "B": torch.randn(320, 4)}, alpha=2.0)
    base = BaseReference(
        name="dream", source="checkpoint:/x", components={}, family=family, prediction=predicts,
        zero_terminal_snr=False, checkpoint={"sha256": "ab" * 32, "autov1": "12345678"},
    )  # fmt: skip
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    about = card().with_fields(base=base)
    KOHYA.write(AdapterUpdates({name: update}, {}), tmp_path / "a.safetensors", about)
    found = read_safetensors_header(tmp_path / "a.safetensors").metadata
    assert found["ss_base_model_version"] == version
    assert found["modelspec.architecture"] == architecture
    assert found.get("modelspec.prediction_type") == stated
    assert (found["ss_sd_model_name"], found["ss_sd_model_hash"]) == ("dream", "12345678")
    assert (found["ss_new_sd_model_hash"], found["ss_zero_terminal_snr"]) == ("ab" * 32, "False")
    again = read_updates(tmp_path / "a.safetensors")
    KOHYA.write(again, tmp_path / "b.safetensors")  # without a card, by what the file says
    assert read_safetensors_header(tmp_path / "b.safetensors").metadata.get("modelspec.prediction_type") == stated


def test_names_of_the_base_that_came_with_a_file_stay_together(tmp_path: Path) -> None:
    said = {"ss_sd_model_name": "animefull.safetensors", "ss_sd_model_hash": "89d59c3d"}
    base = BaseReference(
        name="dream", source="checkpoint:/x", components={}, family="sd15",
        checkpoint={"sha256": "ab" * 32, "autov1": "12345678"},
    )  # fmt: skip
    about = card(file_metadata=said).with_fields(base=base, origin="added")
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    KOHYA.write(AdapterUpdates({name: sample()}, {}), tmp_path / "a.safetensors", about)
    found = read_safetensors_header(tmp_path / "a.safetensors").metadata
    assert {key: found.get(key) for key in said} == said
    assert "ss_new_sd_model_hash" not in found


def test_flow_matching_has_no_prediction_type(tmp_path: Path) -> None:
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    update = ModuleUpdate("lora", {"A": torch.randn(4, 3072), "B": torch.randn(3072, 4)}, alpha=2.0)
    base = BaseReference(name="flux", source="folder:/x", components={}, family="flux1", prediction="flow")
    metadata = kohya_metadata(AdapterUpdates({name: update}, {}), "flux1", card().with_fields(base=base), "a")
    assert "modelspec.prediction_type" not in metadata and "ss_zero_terminal_snr" not in metadata
    assert metadata["ss_base_model_version"] == "flux1"


def test_metadata_of_plain_lora_for_sdxl(tmp_path: Path) -> None:
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    wide = ModuleUpdate("lora", {"A": torch.randn(4, 2048), "B": torch.randn(640, 4)}, alpha=8.0, rslora=True)
    KOHYA.write(AdapterUpdates({name: wide}, {"ss_base_model_version": "sd_v1"}), tmp_path / "a.safetensors")
    header = read_safetensors_header(tmp_path / "a.safetensors")
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight" in header.tensors
    assert header.metadata["ss_network_module"] == "networks.lora"
    assert header.metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert header.metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header.metadata["ss_network_alpha"] == "16.0"  # 8 / sqrt(4) = 16 / 4


def test_attention_layers_get_one_alpha_and_the_same_strength(tmp_path: Path) -> None:
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    alphas = {
        f"{block}.attn1.to_q": 2.0,
        f"{block}.attn1.to_k": 3.0,
        f"{block}.attn2.to_k": 2.0,
        f"{block}.ff.net.2": 5.0,
    }
    modules = {name: replace(sample(), alpha=alpha) for name, alpha in alphas.items()}
    modules["text_encoder.text_model.encoder.layers.0.mlp.fc1"] = replace(sample(), alpha=7.0)
    KOHYA.write(AdapterUpdates(modules, family="sd15"), tmp_path / "a.safetensors")
    found = read_updates(tmp_path / "a.safetensors").modules
    assert [found[name].alpha for name in modules] == [2.0, 2.0, 2.0, 5.0, 7.0]
    for name, update in modules.items():
        assert error(found[name].delta(), update.delta()) < 1e-7


def test_what_the_format_cannot_name_is_refused(tmp_path: Path) -> None:
    language_model = AdapterUpdates({"model.model.layers.0.mlp.up_proj": sample()})
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.up_proj.*peft or diffusers"):
        KOHYA.write(language_model, tmp_path / "a.safetensors")
    head = AdapterUpdates({"unet.conv_in": sample()}, extra={"score.weight": torch.ones(2)})
    with pytest.raises(InputError, match=r"score\.weight"):
        KOHYA.write(head, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    updates = AdapterUpdates({"unet.conv_in": sample()})
    KOHYA.write(updates, path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _file: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        KOHYA.write(replace(updates, metadata={"ss_seed": "1"}), path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_header_that_is_no_table_of_arguments_is_passed_over(tmp_path: Path) -> None:
    pair = {
        f"{Q}.lora_down.weight": torch.ones(2, 4),
        f"{Q}.lora_up.weight": torch.ones(4, 2),
        f"{Q}.alpha": torch.tensor(1.0),
    }
    for arguments in ("no json", "[1]", json.dumps({"rs_lora": "True", "conv_alpha": "x"})):
        path = write(tmp_path / "a.safetensors", pair, ss_network_args=arguments, ss_network_alpha="?")
        assert next(iter(read_updates(path).modules.values())).scale == 0.5
    assert format_of(open_source(path)).name == "kohya"
