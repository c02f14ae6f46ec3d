"""Signatures of adapters: what breaks them, what does not, and what the stock command says of exports."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from haori.bases import find_base
from haori.core.errors import InputError, VerificationError
from haori.core.records import DataReference, Evaluation, Metric
from haori.library import Library, export_stored, sign_stored, verify_signed_folder, verify_stored_signature
from tests.command_line import haori
from tests.library_samples import card_of, stock_lora, written_adapter

pytest.importorskip("OpenSSL", reason="model-signing 1.1.1 needs pyopenssl: pip install 'haori[signing]'")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_key(place: Path, name: str, key=None, password: bytes | None = None) -> tuple[Path, Path]:
    key = key or ec.generate_private_key(ec.SECP256R1())
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = place / f"{name}.pem", place / f"{name}.pub"
    pem = serialization.Encoding.PEM
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, how))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path):
    return write_key(tmp_path, "mine")


@pytest.fixture
def signed(tmp_path, haori_home, keys):
    folder = written_adapter(tmp_path / "a")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    data = DataReference(source="/home/me/d.jsonl", hash="h", format="text", rows={"train": 1}, licence="MIT")
    stored = Library().add(folder, "a", card_of(folder, data=(data,)))
    sign_stored(stored, keys[0])
    return stored


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit(path: Path) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] + 1}))


def link(path: Path) -> None:
    moved = path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(moved)


CHANGES = {
    "a byte of the weights": (lambda f: flip(f / WEIGHTS), WEIGHTS),
    "alpha": (lambda f: edit(f / CONFIG), CONFIG),
    "the template": (lambda f: flip(f / "chat_template.jinja"), "chat_template.jinja"),
    "a file gone": (lambda f: (f / "chat_template.jinja").unlink(), "chat_template.jinja"),
    "a file that exports carry": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "a file that exports leave behind": (lambda f: (f / "run.py").write_text("0"), "run.py"),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_added_or_removed_file_is_named(signed, keys, what):
    verify_stored_signature(signed, keys[1])
    change, name = CHANGES[what]
    change(signed.path)
    with pytest.raises(VerificationError, match=name):
        verify_stored_signature(signed, keys[1])


def test_names_and_measurements_come_and_go(signed, keys):
    library = Library()
    library.add(signed.path, "another-name", signed.card)
    data = DataReference(source="t.jsonl", hash="h", format="text", rows={"test": 1})
    evaluation = Evaluation(data=data, metrics={"accuracy": Metric(value=1.0)}, time="now")
    library.update("a", evaluations=(evaluation,), description="new words", verification=signed.card.verification)
    verify_stored_signature(library.get("another-name"), keys[1])


@pytest.mark.parametrize(
    "field", [{"licence": "CC0-1.0"}, {"parents": ("sha256:" + "0" * 64,)}, {"data": ()}, {"seed": 8}]
)
def test_what_the_card_says_of_its_making_does_not(signed, keys, field):
    changed = Library().update("a", **field)
    with pytest.raises(VerificationError, match=r"provenance\.json was changed"):
        verify_stored_signature(changed, keys[1])


def test_another_key_or_a_forged_list_is_no_proof(signed, keys, tmp_path):
    _, other = write_key(tmp_path, "other")
    with pytest.raises(VerificationError, match="was not made with the private key"):
        verify_stored_signature(signed, other)
    import base64

    path = signed.path / "model.sig"
    bundle = json.loads(path.read_text())
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    flip(signed.path / WEIGHTS)
    import hashlib

    for entry in payload["predicate"]["resources"]:
        if entry["name"] == WEIGHTS:
            entry["digest"] = hashlib.sha256((signed.path / WEIGHTS).read_bytes()).hexdigest()
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    path.write_text(json.dumps(bundle))
    with pytest.raises(VerificationError, match="was not made with the private key"):
        verify_stored_signature(signed, keys[1])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"dsseEnvelope": {"payload": "!"}}', "x" * 100])
def test_a_damaged_signature_is_said_to_be_one(signed, keys, content):
    (signed.path / "model.sig").write_text(content)
    with pytest.raises(VerificationError, match="no signature that can be read"):
        verify_stored_signature(signed, keys[1])


def test_keys_that_cannot_be_used_are_refused(signed, keys, tmp_path):
    wrong = {
        "rsa": write_key(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))[0],
        "curve": write_key(tmp_path, "curve", ec.generate_private_key(ec.SECP256K1()))[0],
        "public": keys[1],
        "locked": write_key(tmp_path, "locked", password=b"secret")[0],
        "missing": tmp_path / "nowhere.pem",
    }
    before = (signed.path / "model.sig").read_bytes()
    for path in wrong.values():
        with pytest.raises(InputError, match=path.name):
            sign_stored(signed, path)
    assert (signed.path / "model.sig").read_bytes() == before
    with pytest.raises(InputError, match="no public key"):
        verify_stored_signature(signed, keys[0])


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_each_curve_signs_and_an_encrypted_key_with_its_password(signed, tmp_path, curve):
    private, public = write_key(tmp_path, "locked", ec.generate_private_key(curve), password=b"secret")
    sign_stored(signed, private, password=b"secret")
    verify_stored_signature(signed, public)


def stock(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model_signing", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_an_export_is_verified_by_the_stock_command(capsys, haori_home, tiny_base_folder, tmp_path, keys):
    folder = stock_lora(tiny_base_folder, tmp_path / "adapter")
    base = find_base(str(tiny_base_folder))
    Library().add(folder, "a", card_of(folder, base.reference()))
    done = haori(capsys, "library", "sign", "a", "--key", keys[0])
    assert done.code == 0, done.err
    assert "signed" in haori(capsys, "library", "show", "a").out
    assert haori(capsys, "library", "verify-signature", "a", "--public-key", keys[1]).code == 0
    out = export_stored("a", tmp_path / "out", base=base)
    command = ("verify", "key", out, "--signature", out / "model.sig", "--public_key", keys[1])
    done = stock(*command)
    assert done.returncode == 0, done.stderr
    assert haori(capsys, "library", "verify-signature", out, "--public-key", keys[1]).code == 0
    assert str(tmp_path) not in (out / "provenance.json").read_text()
    (out / "README.md").write_text("Only words.")
    (out / ".gitattributes").write_text("* lfs")  # as the hub adds
    verify_signed_folder(out, keys[1])
    assert stock(*command).returncode == 0
    for change, name in [
        CHANGES["alpha"],
        CHANGES["a byte of the weights"],
        (lambda f: (f / "x.bin").touch(), "x.bin"),
    ]:
        copy = shutil.copytree(out, tmp_path / f"changed-{name}")
        change(copy)
        done = haori(capsys, "library", "verify-signature", copy, "--public-key", keys[1])
        assert (done.code, name in done.err) == (1, True), done.err
    linked = shutil.copytree(out, tmp_path / "linked")
    link(linked / WEIGHTS)
    with pytest.raises(VerificationError, match=WEIGHTS):
        verify_signed_folder(linked, keys[1])
    edit(out / CONFIG)
    assert stock(*command).returncode == 1
    with pytest.raises(VerificationError, match="not signed"):
        verify_signed_folder(folder, keys[1])


def test_a_folder_that_the_stock_command_signed_is_verified_too(tmp_path, keys):
    folder = written_adapter(tmp_path / "theirs")
    done = stock("sign", "key", folder, "--signature", folder / "model.sig", "--private_key", keys[0])
    assert done.returncode == 0, done.stderr
    verify_signed_folder(folder, keys[1])
    flip(folder / WEIGHTS)
    with pytest.raises(VerificationError, match=WEIGHTS):
        verify_signed_folder(folder, keys[1])


def test_an_export_of_what_is_not_what_was_signed_is_refused(capsys, haori_home, tiny_base_folder, tmp_path, keys):
    folder = stock_lora(tiny_base_folder, tmp_path / "adapter")
    base = find_base(str(tiny_base_folder))
    sign_stored(Library().add(folder, "a", card_of(folder, base.reference())), keys[0])
    Library().update("a", licence="CC0-1.0")
    with pytest.raises(VerificationError, match=r"not exported: it is not what was signed \(provenance.json"):
        export_stored("a", tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_command_names_what_to_install(capsys, signed, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    done = haori(capsys, "library", "sign", "a", "--key", keys[0])
    assert done.code == 2
    assert "pip install 'haori[signing]'" in done.err
