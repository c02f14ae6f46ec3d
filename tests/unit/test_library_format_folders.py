"""Adapters of one file as folders: the file, its model card, the text of credit, and the signature where it holds."""

import pytest
import torch
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.torch import save_file

from haori.core.errors import InputError, VerificationError
from haori.library import Library, export_in_format, import_adapter
from tests.command_line import haori

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture
def stored(tmp_path, haori_home):
    torch.manual_seed(0)
    path = tmp_path / "style v1.safetensors"
    tensors = {
        f"{UNET}.lora_down.weight": torch.randn(4, 768), f"{UNET}.lora_up.weight": torch.randn(320, 4),
        f"{UNET}.alpha": torch.tensor(2.0),
    }  # fmt: skip
    said = {"ss_base_model_version": "sd_v1", "modelspec.license": "cc-by-nc-4.0", "modelspec.trigger_phrase": "zkz"}
    save_file(tensors, path, metadata=said)
    return import_adapter(path, name="style")


def test_a_folder_has_the_file_as_it_came_and_its_model_card(capsys, stored, tmp_path):
    done = haori(capsys, "library", "export", "style", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "commercial use: no" in done.out
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["ATTRIBUTION.md", "README.md", "style.safetensors"]
    kept = (stored.path / "adapter.safetensors").read_bytes()
    assert (out / "style.safetensors").read_bytes() == kept
    front = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    assert (front["library_name"], front["instance_prompt"]) == ("diffusers", "zkz")
    assert "base_model" not in front  # sd_v1 is no repository
    again = haori(capsys, "library", "export", "style", "--out", tmp_path / "out")
    assert (again.code, "not an empty folder" in again.err) == (2, True)


def test_a_file_alone_is_a_file(stored, tmp_path):
    assert export_in_format("style", tmp_path / "x.safetensors", "kohya").is_file()
    assert not (tmp_path / "README.md").exists()


def test_diffusers_finds_its_file_by_name(stored, tmp_path):
    out = export_in_format("style", tmp_path / "out", "diffusers")
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    with pytest.raises(InputError):
        export_in_format("style", tmp_path / "other", "nothing")
    assert not (tmp_path / "other").exists()


def test_the_signature_goes_with_what_was_signed_and_not_with_a_conversion(capsys, stored, tmp_path):
    pytest.importorskip("OpenSSL", reason="model-signing 1.1.1 needs pyopenssl: pip install 'haori[signing]'")
    from haori.library import sign_stored, verify_signed_folder

    key, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    sign_stored(stored, private)
    assert haori(capsys, "library", "verify-signature", "style", "--public-key", public).code == 0
    verify_signed_folder(export_in_format("style", tmp_path / "out", "kohya"), public)
    with pytest.raises(VerificationError, match="not signed"):
        verify_signed_folder(export_in_format("style", tmp_path / "converted", "diffusers"), public)
    Library().update("style", licence="MIT")
    with pytest.raises(VerificationError, match="not what was signed"):
        export_in_format("style", tmp_path / "changed", "kohya")
    assert not (tmp_path / "changed").exists()
