"""API keys: made once, kept as hashes, refused as soon as they are revoked or over; and what a key may use."""

import json
import stat
from datetime import timedelta

import pytest

from haori.core.errors import InputError, StorageError
from haori.server import KeyStore, parse_duration
from tests.command_line import haori


def test_a_key_is_found_by_its_secret_and_only_its_hash_is_kept(tmp_path):
    store = KeyStore(tmp_path / "keys.json")
    created = store.create("app", adapters=["support"])
    assert created.secret.startswith("sk-haori-")
    assert len(created.secret) == len("sk-haori-") + 43  # 256 bits in base64
    text = store.path.read_text()
    assert created.secret not in text
    assert created.secret.removeprefix("sk-haori-") not in text
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert store.find(created.secret).name == "app"
    assert store.find(created.secret + "x") is None
    assert store.find(created.secret[:-1]) is None
    assert store.find("sk-\udcff") is None


def test_a_revoked_key_is_refused_by_a_store_that_is_open_already(tmp_path):
    store, other = KeyStore(tmp_path / "keys.json"), KeyStore(tmp_path / "keys.json")
    secrets = [store.create(name).secret for name in ("a", "b")]
    assert [other.find(secret).name for secret in secrets] == ["a", "b"]
    store.revoke("a")
    assert other.find(secrets[0]) is None
    assert other.find(secrets[1]).name == "b"
    again = store.create("a").secret
    assert again != secrets[0]
    assert other.find(again).name == "a"


def test_a_key_is_over_when_its_time_is_up(tmp_path):
    store = KeyStore(tmp_path / "keys.json")
    over = store.create("old", lifetime=timedelta(seconds=-1))
    assert over.key.expired
    assert store.find(over.secret) is None
    assert store.find(store.create("new", lifetime=timedelta(minutes=1)).secret) is not None


@pytest.mark.parametrize(
    ("patterns", "allowed", "refused"),
    [
        (["*"], ["support", "tiny", "org/base", "a@3"], []),
        (["support"], ["support", "support@1", "support@12"], ["support2", "tiny", "my-support"]),
        (["support@2"], ["support@2"], ["support", "support@1", "support@22"]),
        (["team-*", "tiny"], ["team-a", "team-b@4", "tiny"], ["team", "other"]),
        ([], [], ["support", "tiny"]),
    ],
)
def test_names_that_a_key_may_use(tmp_path, patterns, allowed, refused):
    key = KeyStore(tmp_path / "keys.json").create("k", adapters=patterns, admin=True).key
    assert all(key.allows(name) for name in allowed)
    assert not any(key.allows(name) for name in refused)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("a b", {}, "cannot be called"),
        ("", {}, "cannot be called"),
        ("ok", {"adapters": ["a b"]}, "no pattern"),
        ("ok", {"adapters": ["[a]"]}, "no pattern"),
        ("ok", {"adapters": []}, "allow nothing"),
    ],
)
def test_what_cannot_be_a_key_is_refused(tmp_path, name, options, sentence):
    store = KeyStore(tmp_path / "keys.json")
    with pytest.raises(InputError, match=sentence):
        store.create(name, **options)
    assert not store.path.exists()


def test_names_of_keys_are_unique_and_unknown_ones_get_a_hint(tmp_path):
    store = KeyStore(tmp_path / "keys.json")
    store.create("application")
    with pytest.raises(InputError, match="already"):
        store.create("application")
    with pytest.raises(InputError, match="did you mean 'application'"):
        store.revoke("aplication")


def test_a_damaged_file_lets_nobody_in(tmp_path):
    store = KeyStore(tmp_path / "keys.json")
    secret = store.create("app").secret
    store.path.write_text('{"keys": 3}')
    with pytest.raises(StorageError, match="damaged"):
        store.find(secret)


@pytest.mark.parametrize(("text", "hours"), [("90m", 1.5), ("12h", 12), ("30d", 720)])
def test_lengths_of_time(text, hours):
    assert parse_duration(text) == timedelta(hours=hours)


@pytest.mark.parametrize("text", ["", "30", "0d", "-1d", "1w", "1.5h", "99999999d"])
def test_what_is_no_length_of_time(text):
    with pytest.raises(InputError, match="length of time"):
        parse_duration(text)


def test_keys_on_the_command_line(capsys, haori_home):
    done = haori(capsys, "keys", "create", "web", "--adapters", "support, team-*", "--expires", "30d")
    assert done.code == 0
    secret = done.out.strip()
    assert KeyStore().find(secret).adapters == ("support", "team-*")
    done = haori(capsys, "keys", "create", "ops", "--admin", "--adapters", "")
    key = KeyStore().find(done.out.strip())
    assert key.admin
    assert not key.allows("support")
    done = haori(capsys, "keys", "list")
    assert "web" in done.out
    assert "team-*" in done.out
    assert secret not in done.out
    assert json.loads((haori_home / "keys.json").read_text())["keys"][0]["hash"] not in done.out
    assert haori(capsys, "keys", "revoke", "web").code == 0
    assert KeyStore().find(secret) is None
    done = haori(capsys, "keys", "revoke", "web")
    assert done.code == 2
    assert "There is no key 'web'" in done.err
