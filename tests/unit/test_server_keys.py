"""API keys: made once, kept as hashes, refused as soon as they are revoked or over; and what a key may use."""

import json
import stat
from datetime import timedelta

import pytest
from starlette.datastructures import Headers

from haori.core.errors import InputError, StorageError
from haori.server import Access, KeyStore, parse_duration, training_spelling
from haori.server.access import Caller
from haori.server.errors import ApiError
from haori.server.keys import ApiKey
from haori.server.quotas import Quotas
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


def test_limits_of_a_key_are_kept_and_files_without_them_are_read(tmp_path):
    store = KeyStore(tmp_path / "keys.json")
    limited = store.create("a", max_concurrent=2, tokens_per_minute=1000)
    assert (store.find(limited.secret).max_concurrent, store.find(limited.secret).tokens_per_minute) == (2, 1000)
    plain = store.create("b", lifetime=timedelta(days=1))
    held = json.loads((tmp_path / "keys.json").read_text())["keys"]
    # What 0.1.0 reads has no other fields than these.
    assert set(held[1]) <= {"name", "hash", "adapters", "admin", "created", "expires"}
    old = {"schema_version": 1, "keys": [{**held[1], "expires": None}]}
    (tmp_path / "old.json").write_text(json.dumps(old))
    found = KeyStore(tmp_path / "old.json").find(plain.secret)
    assert (found.max_concurrent, found.tokens_per_minute, found.expires) == (None, None, None)
    for limits in ({"max_concurrent": 0}, {"tokens_per_minute": -5}):
        with pytest.raises(InputError, match="give 1 or more"):
            store.create("c", **limits)


def test_tokens_come_back_evenly_and_answers_at_once():
    clock = [0.0]
    quotas = Quotas(lambda: clock[0])
    key = ApiKey(
        name="a", hash="h", adapters=("*",), created="2026-01-01T00:00:00+00:00", max_concurrent=2,
        tokens_per_minute=60,
    )  # fmt: skip
    first = quotas.open(key, 2)
    with pytest.raises(ApiError, match="may have 2 at once") as refused:
        quotas.check(key)
    assert (refused.value.status, refused.value.retry_after_s) == (429, 1.0)
    with pytest.raises(ApiError, match="3 answers were asked for") as refused:
        quotas.check(key, 3)
    assert refused.value.status == 400
    first.spend(90)
    first.close()
    first.close()
    with pytest.raises(ApiError, match="ask again in 31 s") as refused:
        quotas.open(key, 1)
    assert (refused.value.status, refused.value.retry_after_s) == (429, 31.0)
    clock[0] = 29.0
    with pytest.raises(ApiError, match="ask again in 2 s"):
        quotas.check(key)
    clock[0] = 31.0
    last = quotas.open(key, 1)
    last.spend(1)
    last.close()
    clock[0] = 1000.0
    grant = quotas.open(key, 1)
    grant.spend(60)  # a minute's worth and no more has gathered
    grant.close()
    with pytest.raises(ApiError, match="tokens a minute"):
        quotas.check(key)
    unlimited = key.model_copy(update={"hash": "other", "max_concurrent": None, "tokens_per_minute": None})
    for given in (None, unlimited):
        for _ in range(100):
            quotas.open(given, 50).spend(10**6)


def test_keys_on_the_command_line(capsys, haori_home):
    done = haori(capsys, "keys", "create", "web", "--adapters", "support, team-*", "--expires", "30d")
    assert done.code == 0
    secret = done.out.strip()
    assert KeyStore().find(secret).adapters == ("support", "team-*")
    done = haori(capsys, "keys", "create", "ops", "--admin", "--adapters", "")
    key = KeyStore().find(done.out.strip())
    assert key.admin
    assert not key.allows("support")
    limits = ("--max-concurrent", "3", "--tokens-per-minute", "12345")
    limited = KeyStore().find(haori(capsys, "keys", "create", "small", *limits).out.strip())
    assert (limited.max_concurrent, limited.tokens_per_minute) == (3, 12345)
    done = haori(capsys, "keys", "list")
    assert "12,345" in done.out
    assert "web" in done.out
    assert "team-*" in done.out
    assert secret not in done.out
    assert json.loads((haori_home / "keys.json").read_text())["keys"][0]["hash"] not in done.out
    assert haori(capsys, "keys", "revoke", "web").code == 0
    assert KeyStore().find(secret) is None
    done = haori(capsys, "keys", "revoke", "web")
    assert done.code == 2
    assert "There is no key 'web'" in done.err


def test_both_spellings_are_the_same_key(tmp_path):
    store = KeyStore(tmp_path / "keys.json")
    secret = store.create("lab", scopes=["train"]).secret
    other = training_spelling(secret)
    assert other.startswith("tml-") and secret.removeprefix("sk-haori-") == other.removeprefix("tml-")
    assert store.find(other) == store.find(secret) is not None
    assert store.find("tml-" + secret) is None and store.find(other[:-1]) is None


def test_a_key_is_for_what_it_was_made_for(tmp_path):
    store = KeyStore(tmp_path / "keys.json")
    old = store.create("old").key
    lab = store.create("lab", scopes=["train"], bases=["smollm2-*"], owner="team").key
    assert old.scopes == ("infer",) and old.account == "old" and not old.trains("smollm2-135m")
    assert lab.account == "team" and lab.trains("smollm2-135m") and not lab.trains("llama")
    Caller(lab, admin=False).need("train")
    with pytest.raises(ApiError, match="'lab' is not for answers; make one with `haori keys create NAME --scopes"):
        Caller(lab, admin=False).need("infer")
    with pytest.raises(ApiError, match="may not train 'llama'; it may train smollm2-"):
        Caller(lab, admin=False).need_training_of("llama")
    assert Caller(None, admin=True).account == "local"
    Caller(None, admin=True).need_training_of("llama")


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/v1/chat/completions", "infer"), ("/v1/embeddings", "infer"), ("/sdapi/v1/txt2img", "infer"),
        ("/v1/load", "infer"), ("/v1/files", "train"), ("/v1/files/file-1/content", "train"),
        ("/v1/uploads/u/parts", "train"), ("/v1/fine_tuning/jobs", "train"), ("/v1/webhook_endpoints", "train"),
        ("/v1/models", None), ("/api/v1/asample", None),
    ],
)  # fmt: skip
def test_every_address_asks_for_its_scope(tmp_path, path, scope):
    store = KeyStore(tmp_path / "keys.json")
    secrets = {name: store.create(name, scopes=[name]).secret for name in ("infer", "train")}
    access = Access(store, "127.0.0.1")
    for name, secret in secrets.items():
        for headers in ({"authorization": f"Bearer {secret}"}, {"x-api-key": training_spelling(secret)}):
            if scope in (name, None):
                assert access.admit(path, Headers(headers), "127.0.0.1").account == name
            else:
                with pytest.raises(ApiError, match=f"'{name}' is not for"):
                    access.admit(path, Headers(headers), "127.0.0.1")
    with pytest.raises(ApiError, match="An API key is needed"):
        access.admit(path, Headers({"x-api-key": ""}), "127.0.0.1")
