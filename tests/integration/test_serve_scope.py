"""What a key may use, whatever the name it asks with: names, versions, ids, strengths, blends, registered names."""

from fnmatch import fnmatchcase

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from haori.library import Library
from haori.serve.adapters.directory import AdapterDirectory
from haori.server import KeyStore
from haori.server.access import Caller
from haori.server.errors import ApiError
from haori.server.keys import ApiKey
from tests.library_samples import base_reference, card_of, written_adapter
from tests.server_samples import RepeatingEngine, TwoNumbers, served

# Name of each version, and the content it has: one content may have several names.
CONTENTS = {"secret@1": 1, "secret@2": 2, "public@1": 3, "team-a@1": 4, "team-b@1": 2, "abcdef@1": 5}
GIVEN = {"helpdesk": 1, "front": 3}  # registered at run time


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A directory, and the content id of each version."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAORI_HOME", str(home))
        from haori.core.settings import settings as places

        places.cache_clear()
        library = Library()
        ids = {}
        for full, seed in CONTENTS.items():
            folder = home / f"made-{seed}"
            if not folder.exists():
                written_adapter(folder, seed=seed)
            stored = library.add(folder, full.partition("@")[0], card_of(folder))
            assert stored.name == full
            ids[full] = stored.card.id
        names = AdapterDirectory(library, base_reference(), base_names=["tiny"])
        for name, seed in GIVEN.items():
            full = next(full for full, other in CONTENTS.items() if other == seed)
            names.register(name, full, lambda files, adapter: None)
            ids[name] = ids[full]
        yield names, ids
    places.cache_clear()


def key_of(*patterns):
    return ApiKey(name="k", hash="0" * 64, adapters=patterns, created="2026-01-01T00:00:00+00:00")


def matches(name, patterns):
    return any(fnmatchcase(name, p) or fnmatchcase(name.partition("@")[0], p) for p in patterns)


def meant(spec, ids):
    """Return the content that a spec means, by the rules of the guide; None if it means none."""
    if spec in ids:
        return ids[spec]
    versions = [full for full in CONTENTS if full.partition("@")[0] == spec]
    if versions:
        return ids[versions[-1]]
    digits = spec.removeprefix("sha256:")
    fitting = {identity for identity in ids.values() if identity.removeprefix("sha256:").startswith(digits)}
    return fitting.pop() if len(fitting) == 1 and "@" not in spec else None


def may(specs, patterns, ids):
    """Say whether a request for these parts is within the patterns."""
    owners = [[name for name, identity in ids.items() if identity == meant(spec, ids)] for spec in specs]
    return all(matches(spec, patterns) for spec in specs) and all(
        any(matches(name, patterns) for name in names) for names in owners
    )


def answer(names, patterns, model):
    """Return the content ids that a request would be answered with; None if it is refused."""
    try:
        return {adapter for adapter, _ in Caller(key_of(*patterns), False).resolve(names, model, "tiny").mix}
    except ApiError as error:
        assert error.status in {403, 404}
        return None


def test_a_blend_reaches_no_version_that_its_parts_do_not(library):
    names, ids = library
    digits = ids["secret@1"].removeprefix("sha256:")[:8]
    patterns = ["secret@2", f"{digits[0]}*"]
    assert answer(names, patterns, "secret@2") == {ids["secret@2"]}
    for model in ("secret@1", digits, f"secret@2:0+{digits}", f"secret@2+{digits}", f"{digits}+secret@2:0.5", "secret"):
        assert answer(names, patterns, model) is None, model
    assert answer(names, [*patterns, "helpdesk"], digits) == {ids["secret@1"]}  # by a name that it has too


SPECS = st.one_of(
    st.sampled_from([*CONTENTS, *GIVEN, "secret", "public", "team-a", "team-b", "abcdef"]),
    st.tuples(st.sampled_from([*CONTENTS]), st.integers(6, 20), st.booleans()),
)
WIDE = ["*", "secret", "secret@*", "public", "team-*", "team-b@1", "helpdesk", "f*", "*@1", "?ecret", "[a-f0-9]*", "a*",
        "b*", "0*", "s*", "sha256:*", "tiny", "abcdef@2", "abcdef"]  # fmt: skip
PATTERNS = st.lists(
    st.sampled_from(["secret@2", "secret@1", "team-a@1"]) | st.sampled_from(WIDE), min_size=1, max_size=3
)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.tuples(SPECS, st.sampled_from(["", ":0", ":0.5", ":-1"])), min_size=1, max_size=3),
       patterns=PATTERNS, own=st.booleans())  # fmt: skip
def test_answers_come_from_adapters_that_the_key_may_use(library, parts, patterns, own):
    names, ids = library
    specs = []
    for given_spec, _ in parts:
        spec = given_spec
        if isinstance(given_spec, tuple):
            full, count, is_long = given_spec
            spec = ("sha256:" if is_long else "") + ids[full].removeprefix("sha256:")[:count]
            if own:  # a pattern that fits the very digits that are asked for
                patterns = [*patterns, spec[:9] + "*"]
        specs.append(spec)
    model = "+".join(spec + strength for spec, (_, strength) in zip(specs, parts, strict=True))
    found = answer(names, patterns, model)
    assert (found is not None) == may(specs, patterns, ids)
    for identity in found or ():
        assert any(matches(name, patterns) for name, other in ids.items() if other == identity)


def test_every_route_asks_the_same(library, tiny_tokenizer, tmp_path):
    names, ids = library
    digits = ids["secret@1"].removeprefix("sha256:")[:8]
    secret = KeyStore(tmp_path / "keys.json").create("k", adapters=["secret@2", f"{digits[0]}*", "tiny"]).secret
    engine = RepeatingEngine(tiny_tokenizer)
    with (
        served(engine, names, home=tmp_path, embedder=TwoNumbers()) as server,
        httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {secret}"}) as client,
    ):
        for model, status in ((f"secret@2:0+{digits}", 403), (digits, 403), ("secret@1", 403), ("secret@2", 200)):
            for path, body in (
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
                ("/v1/completions", {"prompt": "hello"}),
                ("/v1/embeddings", {"input": "hello"}),
                ("/classify", {"input": "hello"}),
            ):
                reply = client.post(path, json={"model": model, **body})
                assert reply.status_code == status, (path, model, reply.text)
                assert status == 200 or "secret@1" not in reply.text.replace(f"use {model!r}", "")
            assert client.get(f"/v1/models/{model}").status_code == status
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny", "secret@2"]
        absent = f"{digits[0]}-ecret"  # allowed by its pattern, near to a name that is not
        reply = client.post("/v1/completions", json={"model": absent, "prompt": "a"})
        assert reply.status_code == 404 and "team" not in reply.text and "secret@" not in reply.text
        assert f"There is no adapter {absent!r} that this API key may use" in reply.json()["error"]["message"]
