"""Downloads over real sockets from servers that break off, lie, dribble, lead inwards, or send messages as files."""

import hashlib
import ipaddress
import json
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import pytest

from haori.core.errors import DownloadError, FileFormatError, InputError
from haori.library.exchange import connecting
from haori.library.exchange.addresses import CivitaiAddress, HubAddress, UrlAddress, parse_address
from haori.library.exchange.download import download, fetch_json
from haori.library.exchange.requesting import Limits
from tests.loopback_site import Site, running
from tests.lora_files import kohya_file

LOOPBACK = Limits(loopback=True, headers_s=2.0, stall_s=0.5, least_bytes=1000, total_s=10.0, connect_s=2.0)


@pytest.fixture
def site():
    with running() as site:
        yield site


@pytest.fixture
def lora(tmp_path) -> bytes:
    return kohya_file(tmp_path / "source.safetensors", rank=64).read_bytes()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def left(target: Path) -> set[str]:
    return {path.name for path in target.parent.iterdir()} - {"source.safetensors"}


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hub:org/name", HubAddress("org/name")),
        ("hub:org/name@v1.0/x", HubAddress("org/name", "v1.0/x")),
        ("hub:org/name/sub/a b.safetensors@main", HubAddress("org/name", "main", "sub/a b.safetensors")),
        ("civitai:123", CivitaiAddress(123)),
        ("https://example.org/a?b", UrlAddress("https://example.org/a?b")),
        ("http://example.org/a", UrlAddress("http://example.org/a")),
        ("folder/x", None), ("./hub", None), ("C:/x", None), ("", None),
    ],
)  # fmt: skip
def test_addresses(text, address):
    assert parse_address(text) == address


@pytest.mark.parametrize("text", [
    "hub:name", "hub:../..", "hub:a/b@", "hub:a/b@../x", "hub:a/b/../c", "hub:a/b//c", "hub:a/b/x\\y", "hub:a b/c",
    "civitai:0", "civitai:x", "civitai:", "civitai:1/2", "civitai:-1", "hub:a/b/c\nd",
])  # fmt: skip
def test_no_addresses(text):
    with pytest.raises(InputError, match="is no address on"):
        parse_address(text)


def test_a_file_is_fetched_checked_and_kept_whole(site, lora, tmp_path):
    site.routes["/a"] = lambda request: request.send_file(lora)
    target = tmp_path / "a.safetensors"
    assert download(f"{site.url}/a", target, LOOPBACK, sha256=sha256(lora).upper()) == sha256(lora)
    assert target.read_bytes() == lora and left(target) == {"a.safetensors"}
    assert all("Authorization" not in headers for _, _, headers in site.seen)


def test_a_download_that_breaks_off_goes_on_where_it_stopped(site, lora, tmp_path):
    stops = [1000, 5000, None]
    site.routes["/a"] = lambda request: request.send_file(lora, stop_after=stops.pop(0))
    target = tmp_path / "a.safetensors"
    assert download(f"{site.url}/a", target, LOOPBACK, sha256=sha256(lora)) == sha256(lora)
    asked = [headers.get("Range") for _, _, headers in site.seen]
    assert asked == [None, "bytes=1000-", "bytes=6000-"]


def test_a_later_call_goes_on_and_a_changed_file_begins_anew(site, lora, tmp_path):
    target = tmp_path / "a.safetensors"
    site.routes["/a"] = lambda request: request.send_file(lora, stop_after=1000)
    site.routes["/b"] = site.routes["/a"]
    with pytest.raises(DownloadError, match=r"ended after 3,000 of .* run the command again"):
        download(f"{site.url}/a?token=1", target, LOOPBACK)
    site.seen.clear()
    other = kohya_file(tmp_path / "other" / "x.safetensors", seed=5, rank=64).read_bytes()
    site.routes["/a"] = lambda request: request.send_file(other, '"v2"')
    assert download(f"{site.url}/a?token=2", target, LOOPBACK, sha256=sha256(other)) == sha256(other)
    assert site.seen[0][2]["Range"] == "bytes=3000-" and site.seen[0][2]["If-Range"] == '"v1"'
    # A part of another URL is no beginning of this one.
    with pytest.raises(DownloadError):
        download(f"{site.url}/b", target, LOOPBACK)
    site.seen.clear()
    download(f"{site.url}/a", target, LOOPBACK)
    assert "Range" not in site.seen[0][2]


def test_a_part_without_a_strong_tag_is_not_gone_on_with(site, lora, tmp_path):
    target = tmp_path / "a.safetensors"
    site.routes["/a"] = lambda request: request.send_file(lora, 'W/"v1"', stop_after=1000)
    with pytest.raises(DownloadError, match="ended after 1,000"):
        download(f"{site.url}/a", target, LOOPBACK)
    assert all("Range" not in headers for _, _, headers in site.seen)


def test_a_server_that_sends_another_range_is_refused(site, lora, tmp_path):
    target = tmp_path / "a.safetensors"
    site.routes["/a"] = lambda request: request.send_file(lora, stop_after=1000)
    with pytest.raises(DownloadError):
        download(f"{site.url}/a", target, LOOPBACK)
    headers = {"Content-Range": f"bytes 0-{len(lora) - 1}/{len(lora)}", "ETag": '"v1"'}
    site.routes["/a"] = lambda request: request.send(lora, 206, headers)
    with pytest.raises(DownloadError, match="another part of the file"):
        download(f"{site.url}/a", target, LOOPBACK)
    assert not target.exists()


def test_a_complete_part_is_kept_without_fetching_it_again(site, lora, tmp_path):
    target = tmp_path / "a.safetensors"
    (tmp_path / "a.safetensors.part").write_bytes(lora)
    (tmp_path / "a.safetensors.part.json").write_text(json.dumps([f"{site.url}/a", '"v1"', len(lora)]))
    site.routes["/a"] = lambda request: request.send_file(lora)
    assert download(f"{site.url}/a", target, LOOPBACK) == sha256(lora)
    assert target.read_bytes() == lora


def test_a_truncated_body_without_a_length_is_noticed_by_its_content(site, lora, tmp_path):
    def cut(request):
        request.send_response(200)
        request.send_header("Connection", "close")
        request.end_headers()
        request.wfile.write(lora[:-100])
        request.close_connection = True

    site.routes["/a"] = cut
    target = tmp_path / "a.safetensors"
    with pytest.raises(FileFormatError, match=r"was fetched and not kept: .*truncated"):
        download(f"{site.url}/a", target, LOOPBACK)
    assert left(target) == set()


def test_a_broken_chunk_is_an_end_not_a_file(site, lora, tmp_path):
    def chunked(request):
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        request.wfile.write(b"400\r\n" + lora[:0x200])
        request.wfile.flush()
        request.close_connection = True

    site.routes["/a"] = chunked
    with pytest.raises(DownloadError, match="broke off"):
        download(f"{site.url}/a", tmp_path / "a.safetensors", LOOPBACK)


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        ("application/json", b'{"error": "The creator asks for a login"}', "The creator asks for a login"),
        ("application/octet-stream", b'{"error": {"message": "Early access"}, "code": 401}', "Early access"),
        ("binary/octet-stream", b"<!DOCTYPE html><title>Are you\n human?</title>", "Are you human"),
        ("text/html; charset=utf-8", b"<html><h1>Sign in</h1></html>", "Sign in"),
        ("application/octet-stream", b"<?xml version='1.0'?><Error><Code>Expired</Code></Error>", "without a title"),
        ("application/octet-stream", b'{"message": "\x1b[31m red"}', r"\[31m red"),
    ],
)
def test_a_message_sent_as_a_file_is_told(site, tmp_path, kind, body, said):
    site.routes["/a.safetensors"] = lambda request: request.send(body, 200, {"Content-Type": kind})
    target = tmp_path / "a.safetensors"
    for stated in (None, "0" * 64):
        with pytest.raises(DownloadError, match=said) as told:
            download(f"{site.url}/a.safetensors", target, LOOPBACK, sha256=stated)
        assert "\x1b" not in str(told.value)
        assert left(target) == set()


@pytest.mark.parametrize(("status", "remedy"), [(401, "login"), (404, "Check"), (429, "later"), (500, "500")])
def test_a_refusal_is_told_with_what_the_server_says(site, tmp_path, status, remedy):
    site.routes["/a"] = lambda request: request.send(b'{"message": "because"}', status)
    with pytest.raises(DownloadError, match=rf"answered {status} \(because\)") as told:
        download(f"{site.url}/a", tmp_path / "a.safetensors", LOOPBACK)
    assert remedy in str(told.value)


def test_other_content_is_not_kept(site, lora, tmp_path):
    target = tmp_path / "a.safetensors"
    changed = lora[:-1] + bytes([lora[-1] ^ 1])
    site.routes["/a"] = lambda request: request.send_file(changed)
    with pytest.raises(DownloadError, match=f"sha256 is {sha256(changed)}, and its site states {sha256(lora)}"):
        download(f"{site.url}/a", target, LOOPBACK, sha256=sha256(lora))
    assert left(target) == set()
    site.routes["/a"] = lambda request: request.send_file(b"\x80\x04pickle" * 50)
    with pytest.raises(FileFormatError, match="a Python pickle"):
        download(f"{site.url}/a", target, LOOPBACK)
    assert left(target) == set()


def test_what_is_too_large_is_refused_before_and_while_it_comes(site, lora, tmp_path):
    small = Limits(**{**vars(LOOPBACK), "size_bytes": 1000})
    site.routes["/a"] = lambda request: request.send_file(lora)
    with pytest.raises(DownloadError, match=r"at most 0.0 GB"):
        download(f"{site.url}/a", tmp_path / "a.safetensors", small)

    def endless(request):
        request.send_response(200)
        request.end_headers()
        for _ in range(10_000):
            request.wfile.write(bytes(1000))

    site.routes["/a"] = endless
    with pytest.raises(DownloadError, match="longer than 1,000 bytes"):
        download(f"{site.url}/a", tmp_path / "a.safetensors", small)
    assert (tmp_path / "a.safetensors.part").stat().st_size <= 1000


def test_a_slow_body_is_given_up(site, lora, tmp_path):
    def slow(request):
        request.send_response(200)
        request.send_header("Content-Length", str(len(lora)))
        request.end_headers()
        request.dribble(lora)

    site.routes["/a"] = slow
    began = time.monotonic()
    with pytest.raises(DownloadError, match="less than 2,000 bytes/s"):
        download(f"{site.url}/a", tmp_path / "a.safetensors", LOOPBACK)
    assert time.monotonic() - began < 5


def test_a_silent_server_and_one_that_dribbles_its_head_are_given_up(site, tmp_path):
    short = Limits(**{**vars(LOOPBACK), "headers_s": 0.5})
    site.routes["/head"] = lambda request: request.dribble(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000)
    site.routes["/silent"] = lambda request: time.sleep(3)
    for path in ("/head", "/silent"):
        began = time.monotonic()
        with pytest.raises(DownloadError, match=r"no usable reply within 0\.5 s"):
            download(f"{site.url}{path}", tmp_path / "a.safetensors", short)
        assert time.monotonic() - began < 2.5, path


def test_a_download_takes_no_longer_than_all_of_it_may(site, lora, tmp_path):
    def steady(request):
        request.send_response(200)
        request.send_header("Content-Length", str(len(lora) * 1000))
        request.end_headers()
        try:
            while True:
                request.wfile.write(lora[:2000])
                time.sleep(0.05)
        except OSError:
            pass

    site.routes["/a"] = steady
    hurried = Limits(**{**vars(LOOPBACK), "total_s": 1.0})
    began = time.monotonic()
    with pytest.raises(DownloadError, match="longer than 1 s"):
        download(f"{site.url}/a", tmp_path / "a.safetensors", hurried)
    assert time.monotonic() - began < 3


def test_redirects_are_followed_five_times_and_no_more(site, lora, tmp_path):
    site.routes["/5"] = lambda request: request.send_file(lora)
    for number in range(5):
        site.routes[f"/{number}"] = lambda request, number=number: request.redirect(f"/{number + 1}")
    download(f"{site.url}/0", tmp_path / "a.safetensors", LOOPBACK)
    site.routes["/start"] = lambda request: request.redirect("0", 302)
    with pytest.raises(DownloadError, match="more than 5 times"):
        download(f"{site.url}/start", tmp_path / "b.safetensors", LOOPBACK)


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("http://169.254.169.254/latest/meta-data/", "169.254.169.254, which is not an address of the public"),
        ("https://10.0.0.1/x", "10.0.0.1"),
        ("https://[fd00::1]/x", "fd00::1"),
        ("https://[::ffff:10.1.2.3]/", "10.1.2.3|a01:203"),
        ("https://0x7f.1:1/", None),
        ("https://192.168.0.1./", None),
        ("file:///etc/passwd", "must name a host|not https"),
        ("ftp://example.org/x", "not https"),
        ("https://user:secret@example.org/", "no user or password"),
        ("//100.64.0.1/x", "100.64.0.1"),
        ("https://0.0.0.0/", "0.0.0.0"),
        ("https://224.0.0.1/", "224.0.0.1"),
        ("", None),
    ],
)
def test_a_redirect_inwards_is_refused(site, tmp_path, to, said):
    site.routes["/a"] = lambda request: request.redirect(to)
    with pytest.raises(DownloadError, match=said) as told:
        download(f"{site.url}/a", tmp_path / "a.safetensors", LOOPBACK)
    assert "secret" not in str(told.value)
    assert not (tmp_path / "a.safetensors").exists()


def test_only_the_public_internet_is_asked_and_only_over_https(site, tmp_path):
    with pytest.raises(InputError, match="not https"):
        download(f"{site.url}/a", tmp_path / "a.safetensors", Limits())
    for host in ("127.0.0.1", "localhost", "[::1]", "2130706433"):
        with pytest.raises(DownloadError, match=r"not an address of the public internet|no host"):
            download(f"https://{host}:{site.server_port}/a", tmp_path / "a.safetensors", Limits(connect_s=1))
    assert site.seen == []


_PUBLIC = ("8.8.8.8", "2606:4700::1111", "64:ff9b::808:808")
_NOT_PUBLIC = (
    "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.1.1", "100.64.0.1", "0.0.0.0", "224.0.0.1",
    "255.255.255.255", "198.18.0.1", "::", "::1", "fe80::1", "fc00::1", "ff02::1", "::ffff:10.0.0.1",
    "64:ff9b::7f00:1", "2002:7f00:1::",
)  # fmt: skip


@pytest.mark.parametrize(
    ("address", "public"), [*((each, True) for each in _PUBLIC), *((each, False) for each in _NOT_PUBLIC)]
)
def test_public_addresses(address, public):
    assert connecting.is_public(ipaddress.ip_address(address)) is public


def test_a_name_that_changes_its_address_leads_nowhere_else(site, monkeypatch):
    """DNS rebinding: the name is resolved once, and what was checked is what is connected to."""
    real, connected = socket.getaddrinfo, []
    answers = iter(["93.184.216.34", "127.0.0.1"])

    def resolve(host, port, *args, **kwargs):
        if host == "rebind.example":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]
        return real(host, port, *args, **kwargs)

    def create(address, timeout):
        connected.append(address)
        raise OSError(111, "refused")

    monkeypatch.setattr(connecting.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(connecting.socket, "create_connection", create)
    place = connecting.check_url(f"https://rebind.example:{site.server_port}/a")
    with pytest.raises(DownloadError, match="cannot be reached"):
        connecting.connect(place, timeout_s=1)
    assert connected == [("93.184.216.34", site.server_port)]
    with pytest.raises(DownloadError, match=r"127.0.0.1, which is not"):
        connecting.connect(place, timeout_s=1)
    assert len(connected) == 1


def test_a_token_goes_to_its_own_host_only(site, lora, tmp_path):
    with running() as store:
        store.routes["/file"] = lambda request: request.send_file(lora)
        site.routes["/a"] = lambda request: request.redirect(f"{store.url}/file?signed=1")
        limits = Limits(**{**vars(LOOPBACK), "tokens": {site.url: "secret"}})
        download(f"{site.url}/a", tmp_path / "a.safetensors", limits)
        assert site.seen[0][2]["Authorization"] == "Bearer secret"
        assert all("secret" not in str(headers) for _, _, headers in store.seen)
    assert "secret" not in repr(limits)


def test_a_certificate_for_another_name_is_refused(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
               "-keyout", key, "-out", certificate, "-days", "1", "-subj", "/CN=elsewhere"]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("openssl is not installed")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    site = Site()
    site.socket = context.wrap_socket(site.socket, server_side=True)
    threading.Thread(target=site.serve_forever, args=(0.02,), daemon=True).start()
    try:
        with pytest.raises(DownloadError, match=r"cannot be reached: .*certificate"):
            download(f"https://127.0.0.1:{site.server_port}/a", tmp_path / "a.safetensors", LOOPBACK)
    finally:
        site.shutdown()
        site.server_close()
    assert site.seen == []


def test_json_is_json_of_a_bounded_size(site):
    site.routes["/list"] = lambda request: request.send(b"[1]")
    site.routes["/page"] = lambda request: request.send(b"<html><title>Busy</title></html>")
    site.routes["/deep"] = lambda request: request.send(b'{"a":' * 100_000)
    site.routes["/big"] = lambda request: request.send(b" " * (9 << 20))
    for path, said in {
        "/list": "no JSON object",
        "/page": "Busy",
        "/deep": "no JSON",
        "/big": "more than 8 MiB",
    }.items():
        with pytest.raises(DownloadError, match=said):
            fetch_json(f"{site.url}{path}", LOOPBACK)
