"""Forms, bodies and model names of requests for pictures: whatever comes, it is read or refused with a sentence."""

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haori.core.errors import HaoriError, InputError
from haori.server.errors import ApiError
from haori.server.pictures.body import read_body
from haori.server.pictures.form import read_form
from haori.server.pictures.model_names import tags_of
from haori.server.sdapi.fields import Img2ImgFields, Txt2ImgFields

FIELDS = sorted({*Txt2ImgFields.model_fields, *Img2ImgFields.model_fields, *Txt2ImgFields.unserved, "unknown"})
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
    st.sampled_from(["Euler a", "Lanczos", "Latent", -1, 0, 1, 32, 1e308]),
)  # fmt: skip
NAMES = st.text("abcdefgh_[]", min_size=1, max_size=8)


@settings(max_examples=60)
@given(
    st.dictionaries(NAMES, st.text(max_size=30), max_size=3),
    st.lists(st.tuples(NAMES, st.one_of(st.binary(max_size=200), st.just(b"\r\n--x\r\n--"))), max_size=3),
)
def test_a_form_is_read_as_httpx_wrote_it(fields, files):
    parts = [(name, ("a.png", content)) for name, content in files]
    sent = httpx.Request("POST", "http://x/", data=fields, files=parts or {"none": ("a", b"")})
    form = read_form(sent.headers["content-type"], sent.read())
    assert form.fields == fields
    expected: dict[str, list[bytes]] = {}
    for name, content in files or [("none", b"")]:
        expected.setdefault(name, []).append(content)
    assert form.files == expected


@settings(max_examples=60)
@given(st.binary(max_size=200), st.text(max_size=40))
def test_what_is_no_form_is_refused(body, kind):
    for content_type in (kind, "multipart/form-data; boundary=b"):
        content = body.replace(b"|", b"\r\n--b")
        try:
            read_form(content_type, content)
        except ApiError as error:
            assert error.status == 400 and error.message


@settings(max_examples=150)
@given(st.sampled_from([Txt2ImgFields, Img2ImgFields]), st.dictionaries(st.sampled_from(FIELDS), ODD, max_size=6))
def test_whatever_a_body_holds_it_is_read_or_refused(kind, body):
    try:
        asked, _ = read_body(kind, body, lenient=False)
        asked.settings(1)
        asked.eta_warning()
        if isinstance(asked, Txt2ImgFields):
            asked.hires()
    except (ApiError, HaoriError) as error:
        assert str(error)
        return
    # Nothing was left out: what is read has every value that was given.
    for name, value in body.items():
        if name in kind.model_fields and value is not None and isinstance(value, str):
            assert str(getattr(asked, name)) == value or not isinstance(getattr(asked, name), str)


@pytest.mark.parametrize(
    ("model", "tags"),
    [
        ("base", ""), ("ink", "<lora:ink:1>"), ("ink@2:0.7", "<lora:ink@2:0.7>"), ("base+ink", "<lora:ink:1>"),
        ("ink:0.4+Lora/oil:-0.6", "<lora:ink:0.4><lora:Lora/oil:-0.6>"),
    ],
)  # fmt: skip
def test_a_model_name_stands_for_tags(model, tags):
    assert tags_of(model, "base") == tags


@pytest.mark.parametrize(
    "model",
    ["", "+", "ink+", "ink:", "ink:nan", "ink:inf", "ink:1e9", "ink:101", "a><lora:b:1", "base:0.5", "ink+base",
     "+".join("abcdefghi"), "x" * 1201],
)  # fmt: skip
def test_other_model_names_are_refused(model):
    with pytest.raises(InputError):
        tags_of(model, "base")
