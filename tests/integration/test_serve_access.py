"""Who may do what: keys and their scopes, servers without keys, Host headers, adapters loaded from outside."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from haori.core.errors import InputError
from haori.server import Access, KeyStore
from tests.server_samples import RepeatingEngine, SmallDirectory, served, until

HELLO = [{"role": "user", "content": "hello"}]


def bearer(secret):
    return {"authorization": f"Bearer {secret}"}


def ask(server, model, secret=None, path="/v1/chat/completions", **more):
    headers = bearer(secret) if secret else {}
    body = {"model": model, "messages": HELLO, **more}
    return httpx.post(server.url + path, json=body, headers=headers, timeout=20)


@pytest.fixture
def keys(tmp_path):
    return KeyStore(tmp_path / "keys.json")


@pytest.fixture
def engine(tiny_tokenizer):
    return RepeatingEngine(tiny_tokenizer)


def test_another_address_needs_a_key_that_is_valid(keys):
    with pytest.raises(InputError, match="keys create"):
        Access(keys, "0.0.0.0")
    keys.create("app")
    assert Access(keys, "0.0.0.0").needs_key
    keys.revoke("app")
    with pytest.raises(InputError, match=r"'example\.org' can be reached"):
        Access(keys, "example.org")


def test_a_key_is_asked_for_before_anything_else(engine, keys, tmp_path):
    secret = keys.create("app").secret
    with served(engine, home=tmp_path) as server:
        for headers in (
            {},
            bearer("sk-haori-wrong"),
            {"authorization": f"Basic {secret}"},
            {"authorization": "Bearer"},
        ):
            for method, path, body in (
                ("POST", "/v1/chat/completions", b"{ no json"),
                ("GET", "/v1/models", b""),
                ("GET", "/no/such/address", b""),
                ("GET", "/metrics", b""),
                ("POST", "/v1/load_lora_adapter", b""),
            ):
                reply = httpx.request(method, server.url + path, content=body, headers=headers)
                assert reply.status_code == 401, path
                assert reply.headers["www-authenticate"] == "Bearer"
                assert reply.json()["error"]["code"] in {"missing_api_key", "invalid_api_key"}
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/version").status_code == 200
        assert ask(server, "tiny", secret).status_code == 200
        until(lambda: '"key": "app"' in server.log.getvalue())
        assert secret not in server.log.getvalue()


def test_a_key_may_use_only_its_adapters_in_blends_too(engine, keys, tmp_path):
    secret = keys.create("app", adapters=["support"]).secret
    with served(engine, home=tmp_path) as server:
        for model in ("support", "support@2", "support:0.5", "support:0.2+support@2:0.3"):
            assert ask(server, model, secret).status_code == 200, model
        for model in ("tiny", "other-one", "support:0.5+other-one:0.5", "missing", "abcdef012345", "support+missing"):
            reply = ask(server, model, secret)
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, "model_not_allowed"), model
        assert len(engine.seen) == 4
        listed = httpx.get(f"{server.url}/v1/models", headers=bearer(secret)).json()["data"]
        assert [model["id"] for model in listed] == ["support", "support@2"]
        assert {model["root"] for model in listed} == {None}  # where files lie is for admins
        assert httpx.get(f"{server.url}/v1/models/other-one", headers=bearer(secret)).status_code == 403
        assert httpx.get(f"{server.url}/v1/models/support", headers=bearer(secret)).status_code == 200


def test_digits_of_an_id_are_no_way_around_a_pattern(engine, keys, tmp_path):
    secret = keys.create("app", adapters=["a*"]).secret  # digits of an id may begin with an a
    with served(engine, home=tmp_path) as server:
        reply = ask(server, "abcdef012345", secret)
        assert reply.status_code == 403
        assert "other-one" not in reply.text  # what the digits stand for is not told
        assert engine.seen == []


def test_the_base_is_a_name_like_the_others(engine, keys, tmp_path):
    secret = keys.create("app", adapters=["tiny"]).secret
    with served(engine, home=tmp_path) as server:
        assert ask(server, "tiny", secret).status_code == 200
        assert ask(server, "support", secret).status_code == 403


def test_admins_load_adapters_and_read_metrics_and_others_do_not(engine, keys, tmp_path):
    plain, admin = keys.create("app").secret, keys.create("ops", adapters=[], admin=True).secret
    with served(engine, home=tmp_path) as server:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            reply = httpx.post(server.url + path, json={"lora_name": "support"}, headers=bearer(plain))
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, "admin_key_required")
        assert httpx.get(f"{server.url}/metrics", headers=bearer(plain)).status_code == 403
        assert httpx.get(f"{server.url}/metrics", headers=bearer(admin)).status_code == 200
        assert ask(server, "support", admin).status_code == 403  # this one may ask nothing
        assert httpx.get(f"{server.url}/v1/models", headers=bearer(admin)).json()["data"] == []


def test_a_key_revoked_or_made_counts_from_the_next_request_on(engine, keys, tmp_path):
    with served(engine, home=tmp_path) as server:
        assert ask(server, "tiny").status_code == 200  # no key has been made
        secret = keys.create("app").secret
        assert ask(server, "tiny").status_code == 401
        assert ask(server, "tiny", secret).status_code == 200
        keys.revoke("app")
        assert ask(server, "tiny", secret).status_code == 401
        assert ask(server, "tiny").status_code == 401  # it does not fall open when the last one goes


def test_a_damaged_file_of_keys_lets_nobody_in(engine, keys, tmp_path):
    secret = keys.create("app").secret
    with served(engine, home=tmp_path) as server:
        keys.path.write_text("{")
        reply = ask(server, "tiny", secret)
        assert reply.status_code == 500
        sentence = reply.json()["error"]["message"]
        assert sentence == "The file of API keys 'keys.json' is damaged or cannot be read."
        until(lambda: str(keys.path) in server.log.getvalue())  # whoever runs the server is told where


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("localhost:8000", 200), ("127.0.0.1:1", 200), ("[::1]:8000", 200), ("[::1]", 200),
     ("evil.example", 403), ("evil.example:8000", 403), ("127.0.0.1.evil.example", 403), ("", 403), ("10.0.0.1", 403)],
)  # fmt: skip
def test_a_server_without_keys_answers_only_to_its_own_names(engine, tmp_path, host, status):
    with served(engine, home=tmp_path) as server:
        for path in ("/health", "/v1/models", "/metrics"):
            assert httpx.get(server.url + path, headers={"host": host}).status_code == status


def test_no_other_origin_may_read_replies_or_post(engine, tmp_path):
    with served(engine, home=tmp_path) as server:
        origin = {"origin": "https://evil.example"}
        reply = httpx.get(f"{server.url}/v1/models", headers=origin)
        assert not [name for name in reply.headers if name.startswith("access-control")]
        preflight = {
            **origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-type",
        }
        assert httpx.options(f"{server.url}/v1/load_lora_adapter", headers=preflight).status_code == 405
        simple = {**origin, "content-type": "text/plain"}  # what a form may send without asking
        body = '{"lora_name": "x", "lora_path": "/tmp"}'
        assert httpx.post(f"{server.url}/v1/load_lora_adapter", content=body, headers=simple).status_code == 400


def test_an_admin_route_without_keys_is_for_this_machine(engine, tmp_path):
    with served(engine, home=tmp_path) as server:
        through = {"x-forwarded-for": "203.0.113.5"}
        assert httpx.get(f"{server.url}/metrics").status_code == 200
        assert httpx.get(f"{server.url}/metrics", headers=through).status_code == 403
        asked = {"lora_name": "support"}
        reply = httpx.post(f"{server.url}/v1/unload_lora_adapter", json=asked, headers=through)
        assert reply.status_code == 403


def test_adapters_are_loaded_only_from_the_allowed_folders(engine, tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "mine").mkdir(parents=True)
    outside.mkdir()
    (root / "link").symlink_to(outside)
    with served(engine, SmallDirectory(roots=[root]), home=tmp_path) as server:

        def load(**asked):
            return httpx.post(f"{server.url}/v1/load_lora_adapter", json=asked)

        reply = load(lora_name="mine", lora_path=str(root / "mine"))
        assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
        assert reply.headers["content-type"].startswith("text/plain")
        assert ask(server, "mine").status_code == 200
        assert load(lora_name="mine", lora_path=str(root / "mine")).status_code == 400
        assert load(lora_name="mine", lora_path=str(root / "mine"), load_inplace=True).status_code == 200
        assert load(lora_name="tiny", lora_path=str(root / "mine")).status_code == 400
        assert load(lora_name="x", lora_path=str(root / "missing")).status_code == 404
        for path in (root / "link", root / ".." / "outside", outside, "/etc"):
            assert load(lora_name="x", lora_path=str(path)).status_code in {400, 404}
        assert ask(server, "x").status_code == 404
        for missing in ({"lora_name": "x"}, {"lora_path": "x"}, {"lora_name": "", "lora_path": "x"}):
            assert load(**missing).status_code == 400
        unload = f"{server.url}/v1/unload_lora_adapter"
        reply = httpx.post(unload, json={"lora_name": "mine"})
        assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'mine' removed successfully.")
        assert httpx.post(unload, json={"lora_name": "mine"}).status_code == 404
        assert ask(server, "mine").status_code == 404


def test_requests_take_turns_by_key_and_by_the_name_as_it_was_asked_for(engine, keys, tmp_path):
    with served(engine, home=tmp_path) as server:
        for model in ("tiny", "support", "support:0.5", "support:-1"):
            assert ask(server, model).status_code == 200
    assert [request.turn for request in engine.seen] == [
        ("", "tiny"), ("", "support"), ("", "support:0.5"), ("", "support:-1"),
    ]  # fmt: skip
    one, other = keys.create("one").secret, keys.create("other").secret
    later = RepeatingEngine(engine.tokenizer)
    with served(later, home=tmp_path) as server:
        for secret in (one, other, one):
            assert ask(server, "tiny", secret).status_code == 200
    owners = [request.owner for request in later.seen]
    assert owners[0] == owners[2] != owners[1]
    assert "" not in owners
    assert not {one, other} & set(owners)


def test_a_key_with_limits_gets_429_beyond_them_and_other_keys_go_on(tiny_tokenizer, keys, tmp_path):
    one = keys.create("one", max_concurrent=2).secret
    few = keys.create("few", tokens_per_minute=20).secret
    other = keys.create("other").secret
    with served(RepeatingEngine(tiny_tokenizer, step_s=0.02), home=tmp_path) as server:
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, server, "tiny", one, max_tokens=100) for _ in range(2)]
            until(lambda: server.engine.status().running == 2)
            refused = ask(server, "tiny", one)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "key_concurrency_exceeded")
            assert int(refused.headers["retry-after"]) >= 1
            assert "'one'" in refused.json()["error"]["message"]
            assert ask(server, "tiny", one, n=3).status_code == 429
            assert ask(server, "tiny", other, max_tokens=1).status_code == 200
            assert [reply.result().status_code for reply in asked] == [200, 200]
        assert ask(server, "tiny", one, n=3).status_code == 400  # never may
        assert ask(server, "tiny", one, n=2, max_tokens=1).status_code == 200
        # An answer that its client gave up gives its place back.
        with pytest.raises(httpx.TimeoutException):
            httpx.post(
                f"{server.url}/v1/chat/completions", headers=bearer(one), timeout=0.5,
                json={"model": "tiny", "messages": HELLO, "n": 2, "max_tokens": 200},
            )  # fmt: skip
        until(lambda: server.engine.status().running == 0)
        assert ask(server, "tiny", one, n=2, max_tokens=1).status_code == 200
        assert ask(server, "tiny", few, max_tokens=30).status_code == 200
        refused = ask(server, "tiny", few)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "key_tokens_exceeded")
        assert 2 <= int(refused.headers["retry-after"]) <= 200
        assert ask(server, "tiny", other, max_tokens=1).status_code == 200
