"""Bases of several components: what is read of a pipeline, what its fingerprints depend on, what is refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from haori.bases import Base, find_base, load_tokenizer
from haori.core.errors import BaseError, FileFormatError, InputError
from haori.core.records import BaseReference
from tests.command_line import haori
from tests.pipeline_folders import TEXT_ENCODER, UNET, write_part, write_pipeline


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipelines") / "painter", tiny_base_folder)


@pytest.fixture
def folder(made: Path, tmp_path: Path, haori_home: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "painter"))


def canonical(data: object) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def test_the_components_of_a_pipeline_are_its_parts_with_weights(folder: Path):
    base = find_base(str(folder))
    assert base.pipeline == "StableDiffusionPipeline"
    assert {name: part.architecture for name, part in base.components.items()} == {
        "text_encoder": TEXT_ENCODER,
        "unet": UNET,
        "vae": "AutoencoderKL",
    }
    unet, text = base.components["unet"], base.components["text_encoder"]
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert (unet.path, unet.parameters, unet.size_bytes) == (folder / "unet", 2 * 4 * 4 * 9, file.stat().st_size)
    shapes = [["conv_in.weight", 4, 4, 3, 3], ["conv_out.weight", 4, 4, 3, 3]]
    assert unet.fingerprint.structure == canonical([UNET, shapes])
    assert unet.fingerprint.weights == canonical([f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"])
    assert unet.fingerprint.tokenizer is None
    assert base.parameters == sum(part.parameters for part in base.components.values())
    assert base.size_bytes == sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
    assert text.parameters == _clip_parameters(folder)


def _clip_parameters(folder: Path) -> int:
    from transformers import CLIPTextModel

    return sum(p.numel() for p in CLIPTextModel.from_pretrained(folder / "text_encoder").parameters())


def test_a_text_encoder_has_the_fingerprint_of_its_tokenizer(folder: Path, tiny_base_folder: Path):
    before = find_base(str(folder)).components["text_encoder"].fingerprint
    assert before.tokenizer == find_base(str(tiny_base_folder)).fingerprint.tokenizer
    document = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    document["model"]["merges"].pop()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(document))
    after = find_base(str(folder)).components["text_encoder"].fingerprint
    assert after.tokenizer != before.tokenizer
    assert (after.structure, after.weights) == (before.structure, before.weights)


def test_other_weights_change_the_fingerprint_of_their_component_only(folder: Path):
    before = find_base(str(folder))
    write_part(folder, "vae", "AutoencoderKL", seed=7)
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    after = find_base(str(folder))
    changed = [name for name in before.components if before.components[name].fingerprint
               != after.components[name].fingerprint]  # fmt: skip
    assert changed == ["vae"]
    assert before.id != after.id
    assert before.components["vae"].fingerprint.compare(after.components["vae"].fingerprint) == "other weights"


def test_weights_in_several_files_and_as_a_variant_are_read(folder: Path):
    whole = find_base(str(folder)).components["unet"].fingerprint
    unet = folder / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    assert find_base(str(folder)).components["unet"].fingerprint == whole
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    (unet / "diffusion_pytorch_model.fp16.safetensors").rename(unet / shard)
    index = {"weight_map": {f"conv_{at}.weight": shard for at in ("in", "out")}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert find_base(str(folder)).components["unet"].fingerprint == whole


def _without_unet(folder: Path) -> None:
    shutil.rmtree(folder / "unet")


def _two_variants(folder: Path) -> None:
    write_part(folder, "unet", UNET, file="diffusion_pytorch_model.fp16.safetensors")
    write_part(folder, "unet", UNET, file="diffusion_pytorch_model.bf16.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def _pickle(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")


def _truncated(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def _index(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model_index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _own_code(folder: Path) -> None:
    (folder / "unet" / "my_unet.py").write_text("raise SystemExit('run')")
    _index(unet=["my_unet", "MyUnet"])(folder)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (_without_unet, BaseError, r"lacks its part 'unet' \(UNet2DConditionModel\)"),
        (_two_variants, BaseError, "only as the variants bf16, fp16"),
        (_pickle, BaseError, "pickles can run code"),
        (_truncated, FileFormatError, "the file is truncated"),
        (_own_code, BaseError, "Python code of its own for its component 'unet'"),
        (_index(_class_name=["pipeline", "Mine"]), BaseError, "Python code of its own for the pipeline 'Mine'"),
        (_index(_class_name=None), FileFormatError, "names no pipeline"),
        (_index(**{"../unet": ["diffusers", UNET]}), FileFormatError, "'../unet', which is not allowed"),
    ],
)
def test_a_damaged_pipeline_is_refused(folder: Path, change: Callable[[Path], None], error: type, said: str):
    change(folder)
    with pytest.raises(error, match=said):
        find_base(str(folder))


def test_a_text_model_with_only_a_variant_is_no_base(tiny_base_folder: Path, tmp_path: Path, haori_home: Path):
    """transformers would not load it."""
    copy = Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))
    (copy / "model.safetensors").rename(copy / "model.fp16.safetensors")
    with pytest.raises(BaseError, match="holds no weights"):
        find_base(str(copy))


def test_the_only_component_of_a_text_base_is_the_model(tiny_base_folder: Path, haori_home: Path):
    base = find_base(str(tiny_base_folder))
    assert list(base.components) == ["model"]
    part = base.components["model"]
    assert (base.fingerprint, base.context_length, base.id) == (part.fingerprint, 256, part.fingerprint.id)
    assert (base.parameters, base.size_bytes, base.quantization) == (part.parameters, part.size_bytes, None)


@pytest.mark.parametrize("ask", [
    lambda base: base.fingerprint, lambda base: base.context_length, lambda base: base.reference().fingerprint,
    load_tokenizer,
])  # fmt: skip
def test_nothing_takes_a_pipeline_for_one_model(folder: Path, ask: Callable[[Base], object]):
    with pytest.raises(InputError, match="'painter' is not one model: it has the components text_encoder, unet, vae"):
        ask(find_base(str(folder)))


def test_a_reference_of_a_pipeline_holds_a_fingerprint_for_each_component(folder: Path):
    reference = find_base(str(folder)).reference()
    written = json.loads(reference.model_dump_json())
    assert "fingerprint" not in written
    assert sorted(written["components"]) == ["text_encoder", "unet", "vae"]
    assert BaseReference.model_validate(written) == reference == reference.with_fields(licence=None)


def test_a_reference_of_one_model_is_written_as_ever(tiny_base_folder: Path, haori_home: Path):
    """The keys and their order are those of Haori 0.1.0, which refuses any other."""
    kept = Path(__file__).parents[1] / "fixtures" / "0.1.0" / "home" / "runs"
    old = json.loads(next(kept.glob("*/base.json")).read_text())
    reference = find_base(str(tiny_base_folder)).reference()
    new = json.loads(reference.model_dump_json())
    assert list(new) == list(old)
    assert list(new["fingerprint"]) == list(old["fingerprint"])
    assert BaseReference.model_validate(old).fingerprint.model_dump() == old["fingerprint"]
    both = {**new, "components": {"model": new["fingerprint"]}}
    with pytest.raises(ValueError, match="either a fingerprint or components"):
        BaseReference.model_validate(both)


def test_show_lists_the_components(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert haori(capsys, "bases", "add", folder).code == 0
    done = haori(capsys, "bases", "show", "painter")
    assert done.code == 0
    for name, part in find_base("painter").components.items():
        (row,) = (line for line in done.out.splitlines() if part.fingerprint.id in line)
        assert name in row and part.architecture[:12] in row
    assert "painter" in haori(capsys, "bases", "list").out


@pytest.mark.parametrize("command", ["train", "data"])
def test_a_command_for_text_names_the_components_and_the_tasks(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    arguments = {
        "train": ["train", "--task", "causal_lm", "--base", folder, "--data", rows, "--name", "mine"],
        "data": ["data", "check", rows, "--base", folder],
    }
    done = haori(capsys, *arguments[command])
    said = " ".join(done.err.split())
    assert done.code == 2
    assert "'painter' is a StableDiffusionPipeline with the components text_encoder, unet, vae" in said
    assert "causal_lm" in said and "what can learn on it is text_to_image" in said
