"""Adapters of one file in the library: read, proved without or with a base, kept to the byte, written anew."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from haori.core.errors import (
    FileFormatError,
    InputError,
    LibraryError,
    MismatchError,
    VerificationError,
)
from haori.library import Library, convert_stored, import_adapter, inspect_adapter, name_for, verify_stored
from haori.library.formats import diffusers
from haori.library.stated import Stated
from tests.command_line import haori
from tests.pipeline_folders import write_pipeline

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
SAID = {
    "ss_base_model_version": "sd_v1", "ss_sd_model_name": "anime.safetensors", "ss_num_train_images": "40",
    "ss_tag_frequency": json.dumps({"10_cat": {"grin": 30, "cat": 40}, "5_dog": {"grin": 5}}),
    "modelspec.trigger_phrase": "zkz style, grin", "modelspec.license": "cc-by-4.0",
}  # fmt: skip


def tensors(*, unet: bool = True, width: int = 16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {
        f"{TEXT}.lora_down.weight": torch.randn(2, width), f"{TEXT}.lora_up.weight": torch.randn(width, 2),
        f"{TEXT}.alpha": torch.tensor(1.0),
    }  # fmt: skip
    if unet:
        found |= {
            f"{UNET}.lora_down.weight": torch.randn(4, 768), f"{UNET}.lora_up.weight": torch.randn(320, 4),
            f"{UNET}.alpha": torch.tensor(2.0),
        }  # fmt: skip
    return found


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "Zkz style v1.safetensors"
    save_file(tensors(), path, metadata=SAID)
    return path


def test_a_file_is_added_without_its_base_and_kept_to_the_byte(file):
    stored = import_adapter(file, name="zkz")
    card = stored.card
    data = file.read_bytes()
    assert (stored.path / "adapter.safetensors").read_bytes() == data
    assert (card.format, card.method, card.rank, card.task) == ("kohya", "lora", 4, "text_to_image")
    assert (card.base.name, card.base.family, card.base.components) == ("Stable Diffusion 1", "sd15", {})
    assert card.components == ("text_encoder", "unet")
    assert card.trainable_parameters == 4 * (768 + 320) + 2 * 32
    assert card.file_hashes["sha256"] == hashlib.sha256(data).hexdigest()
    assert card.file_hashes["autov2"] == hashlib.sha256(data).hexdigest()[:10]
    header = 8 + int.from_bytes(data[:8], "little")
    assert card.file_hashes["autov3"] == hashlib.sha256(data[header:]).hexdigest()[:12]
    assert (card.trigger_words, card.licence) == (("zkz style", "grin"), "CC-BY-4.0")
    assert [check.name for check in card.verification.checks] == ["keys", "finite", "delta", "family", "base"]
    assert Library().get("zkz").card == card
    assert Library().rebuild().adapters == 1
    assert import_adapter(file, name="zkz").name == "zkz@1", "the same content is not stored twice"
    assert import_adapter(file, name="other").card.id == card.id
    assert verify_stored(Library(), "zkz").passed


def test_what_is_said_elsewhere_goes_before_the_header(file):
    stored = import_adapter(file, name="zkz", stated=Stated(licence="MIT", trigger_words=("zkz",)))
    assert (stored.card.licence, stored.card.trigger_words) == ("MIT", ("zkz",))


def spoiled(change):
    found = tensors()
    change(found)
    return found


def to_zero(found):
    for key in found:
        if "lora_up" in key:
            found[key] = torch.zeros_like(found[key])


def to_scale_zero(found):
    for key in found:
        if key.endswith(".alpha"):
            found[key] = torch.tensor(0.0)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda t: t[f"{UNET}.lora_up.weight"][3].fill_(float("nan")), FileFormatError, "NaN"),
        (lambda t: t[f"{TEXT}.lora_down.weight"][1, 2:3].fill_(float("inf")), FileFormatError, "infinity"),
        (to_scale_zero, VerificationError, "none of its 2 modules changes anything"),
        (to_zero, VerificationError, "none of its 2 modules changes anything"),
        (lambda t: t.update({f"{UNET}.oft_blocks": torch.ones(4, 2, 2)}), FileFormatError, "oft_blocks"),
        (lambda t: t.update({f"{UNET}.surprise": torch.ones(2)}), FileFormatError, "surprise"),
        (lambda t: t.pop(f"{UNET}.lora_up.weight"), FileFormatError, "to_k"),
        (lambda t: t.update({f"{UNET}.lora_up.weight": torch.ones(320, 3)}), FileFormatError, "to_k"),
    ],
)
def test_a_faulty_file_is_refused_with_a_sentence_and_nothing_is_stored(tmp_path, change, error, said):
    save_file(spoiled(change), tmp_path / "bad.safetensors")
    with pytest.raises(error, match=said):
        import_adapter(tmp_path / "bad.safetensors", name="bad")
    assert Library().list() == ()


def test_one_module_that_changes_nothing_is_named(tmp_path):
    found = tensors()
    found[f"{TEXT}.lora_up.weight"] = torch.zeros(16, 2)
    save_file(found, tmp_path / "half.safetensors")
    [delta] = [c for c in import_adapter(tmp_path / "half.safetensors", name="half").card.verification.checks if
               c.name == "delta"]  # fmt: skip
    assert "1 modules are changed; not changed at all: 1, first 'text_encoder." in delta.detail


def test_a_changed_byte_in_the_library_is_found(file):
    stored = import_adapter(file, name="zkz")
    kept = stored.path / "adapter.safetensors"
    data = bytearray(kept.read_bytes())
    data[-3] ^= 1
    kept.write_bytes(data)
    assert not verify_stored(Library(), "zkz").passed
    [problem] = Library().rebuild().problems
    assert "are not those its card describes" in problem


def test_with_its_base_every_module_must_have_its_place(tmp_path, tiny_base_folder):
    from haori.bases import find_base

    folder = write_pipeline(tmp_path / "tiny-sd", tiny_base_folder, _class_name="KandinskyPipeline")
    base = find_base(str(folder))
    save_file(tensors(unet=False), tmp_path / "fits.safetensors")
    card = import_adapter(tmp_path / "fits.safetensors", base, name="fits").card
    assert set(card.base.components) == {"unet", "vae", "text_encoder"}
    checks = {check.name: check.detail for check in card.verification.checks}
    assert "all 1 modules have their place and shape" in checks["base"]
    assert "skipped: predictions of a KandinskyPipeline" in checks["effect"], "no family is known for it"
    assert verify_stored(Library(), "fits").passed, "the base on the card is found again"
    save_file(tensors(unet=False, width=24), tmp_path / "wide.safetensors")
    with pytest.raises(MismatchError, match=r"q_proj: the update is 24 x 24, the base has 16 x 16"):
        import_adapter(tmp_path / "wide.safetensors", base, name="wide")
    save_file(tensors(), tmp_path / "more.safetensors")
    with pytest.raises(MismatchError, match=r"1 of its 2 modules do not fit.*attn2.to_k: there is no such module"):
        import_adapter(tmp_path / "more.safetensors", base, name="more")
    assert [stored.name for stored in Library().list()] == ["fits@1"]


def test_a_file_is_written_as_it_came_or_for_another_tool(file, tmp_path):
    import_adapter(file, name="zkz")
    assert convert_stored("zkz", tmp_path / "same.safetensors", "kohya").read_bytes() == file.read_bytes()
    written = load_file(convert_stored("zkz", tmp_path / "new" / "d.safetensors", "diffusers"))
    found = tensors()
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    a, b = (written[f"{key}.lora_{part}.weight"].double() for part in "AB")
    wanted = 0.5 * found[f"{UNET}.lora_up.weight"].double() @ found[f"{UNET}.lora_down.weight"].double()
    config = json.loads(read_header(tmp_path / "new" / "d.safetensors")["lora_adapter_metadata"])
    alpha = config.get("unet.alpha_pattern", {}).get(key.removeprefix("unet."), config.get("unet.lora_alpha"))
    torch.testing.assert_close(alpha / 4 * b @ a, wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match="already exists"):
        convert_stored("zkz", tmp_path / "same.safetensors", "diffusers")


def read_header(path):
    with path.open("rb") as stream:
        return json.loads(stream.read(int.from_bytes(stream.read(8), "little")))["__metadata__"]


def test_a_writer_that_is_off_by_a_thousandth_is_caught(file, tmp_path, monkeypatch):
    import_adapter(file, name="zkz")
    write = type(diffusers.FORMAT).write

    def wrong(self, updates, path, card=None, **settings):
        import dataclasses

        name, update = next(iter(updates.modules.items()))
        other = dataclasses.replace(update, alpha=update.alpha * 1.001)
        write(self, dataclasses.replace(updates, modules={**updates.modules, name: other}), path, card, **settings)

    monkeypatch.setattr(type(diffusers.FORMAT), "write", wrong)
    with pytest.raises(VerificationError, match=r"changes its weight otherwise, by 0\.001"):
        convert_stored("zkz", tmp_path / "d.safetensors", "diffusers")
    assert not list(tmp_path.glob("*d.safetensors*"))


def test_a_writer_that_loses_what_lies_beside_the_modules_is_caught(tmp_path, monkeypatch):
    import dataclasses

    path = tmp_path / "with.safetensors"
    save_file({**tensors(), "bundle_emb.zkz.string_to_param.*": torch.ones(2, 768)}, path)
    import_adapter(path, name="with")
    kind = type(diffusers.FORMAT)
    write = kind.write

    def forgetful(self, updates, path, card=None, **settings):
        write(self, dataclasses.replace(updates, extra={}), path, card, **settings)

    monkeypatch.setattr(kind, "write", forgetful)
    with pytest.raises(VerificationError, match=r"it lacks 'bundle_emb\.zkz"):
        convert_stored("with", tmp_path / "d.safetensors", "diffusers")
    assert not (tmp_path / "d.safetensors").exists()


def test_text_commands_say_that_it_is_for_pictures(file):
    stored = import_adapter(file, name="zkz")
    with pytest.raises(FileFormatError, match="is for an image model and kept as one file"):
        inspect_adapter(stored.path)


def test_the_command_shows_what_the_file_tells(file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = haori(capsys, "library", "add", file)
    assert done.code == 0, done.err
    digits = hashlib.sha256(file.read_bytes()).hexdigest()
    for text in ("Zkz-style-v1@1", "Stable Diffusion 1", "rank 4", "zkz style, grin", digits, "anime.safetensors",
                 "cat (40), grin (35)", "skipped: it was added without its base", "text_encoder, unet"):  # fmt: skip
        assert text in done.out.replace("│", ""), text
    assert "the file alone" in haori(capsys, "library", "list").out
    chat = haori(capsys, "chat", "Zkz-style-v1")
    assert chat.code != 0
    assert "Traceback" not in chat.err


def test_names_are_made_of_files(tmp_path):
    for given, wanted in (("ねこ cat.safetensors", "cat"), ("a__b (1).safetensors", "a__b-1"), ("Ünï.st", "Uni")):
        (tmp_path / given).touch()
        assert name_for(tmp_path / given) == wanted
    (tmp_path / "猫.safetensors").touch()
    with pytest.raises(LibraryError, match="give one with --name"):
        name_for(tmp_path / "猫.safetensors")
