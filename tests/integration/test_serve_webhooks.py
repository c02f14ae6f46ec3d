"""Webhooks: made and sent by the official client, checked by its own verification, and kept from inside addresses."""

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import openai
import pytest

from haori.core.settings import settings
from haori.jobs.database.connection import open_database
from haori.jobs.queue.store import JobStore
from haori.jobs.webhooks import store as store_module
from haori.jobs.webhooks.deliverer import Deliverer
from haori.jobs.webhooks.sending import signature
from haori.server.jobs_service import open_job_service
from tests.server_samples import RepeatingEngine, served, until

DONE = "fine_tuning.job.succeeded"


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append((dict(self.headers.items()), body.decode()))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        self.send_response(status)
        if status == 302:
            self.send_header("location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
        self.end_headers()

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture
def receiver():
    server = HTTPServer(("127.0.0.1", 0), Receiver)
    server.got, server.statuses = [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join(5)
    server.server_close()


@pytest.fixture
def allowed(monkeypatch):
    monkeypatch.setenv("HAORI_WEBHOOK_HOSTS", '["127.0.0.1", "*.example.org", "localhost"]')
    monkeypatch.setenv("HAORI_WEBHOOK_TO_LOOPBACK", "true")
    settings.cache_clear()


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch):
    monkeypatch.setattr(Deliverer.__init__, "__defaults__", (0.2,))  # seconds between looks at the jobs


@pytest.fixture
def client(tiny_tokenizer, tmp_path):
    jobs = open_job_service(open_database())
    with served(RepeatingEngine(tiny_tokenizer), home=tmp_path, jobs=jobs) as server:
        url = f"{server.url}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, _strict_response_validation=True) as client:
            yield client


def ended_job(state="succeeded"):
    database = open_database()
    store = JobStore(database)
    job = store.submit("fine_tune", {})
    claimed = store.claim("w")
    assert claimed is not None and claimed.id == job.id
    if state == "succeeded":
        store.finish(claimed, {})
    else:
        store.fail(claimed, "No.")
    database.close()
    return job.id


def test_a_signature_equals_the_example_of_standard_webhooks():
    body = b'{"test": 2432232314}'
    given = signature("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert given == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_an_ended_job_is_told_of_until_it_is_heard(client, receiver, allowed, monkeypatch):
    monkeypatch.setattr(store_module, "_WAITS_S", (0.1, 0.1, 0.1))
    url = f"http://127.0.0.1:{receiver.server_port}/hook?a=b"
    made = client.webhooks.create(name="mine", url=url, event_types=[DONE])
    assert made.signing_secret.startswith("whsec_") and made.signing_secret.endswith(made.signing_secret_hint)
    receiver.statuses[:] = [500, 302]
    ended_job("failed")  # which was not asked for
    job = ended_job()
    until(lambda: len(receiver.got) == 3, 20)
    events = [client.webhooks.unwrap(body, headers, secret=made.signing_secret) for headers, body in receiver.got]
    assert {(event.type, event.data.id, event.id) for event in events} == {(DONE, job, events[0].id)}
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(receiver.got[0][1] + " ", receiver.got[0][0], secret=made.signing_secret)
    time.sleep(0.7)  # three more looks at the jobs
    assert len(receiver.got) == 3  # heard once, told no more; nothing went to where the redirect led


def test_what_was_not_sent_is_sent_after_a_restart(tiny_tokenizer, tmp_path, receiver, allowed):
    jobs = open_job_service(open_database())
    url = f"http://127.0.0.1:{receiver.server_port}/"
    jobs.deliverer.close()
    hook = jobs.webhooks.create("local", "mine", url, [DONE])
    jobs.close()
    ended_job()
    again = open_job_service(open_database())
    until(lambda: receiver.got, 10)
    until(lambda: again.webhooks.deliveries_of(hook.id)[0].delivered, 10)
    again.close()


def test_an_endpoint_is_changed_rotated_tested_and_deleted(client, receiver, allowed):
    url = f"http://127.0.0.1:{receiver.server_port}/"
    made = client.webhooks.create(name="mine", url=url, event_types=[DONE])
    assert [found.id for found in client.webhooks.list()] == [made.id]
    assert client.webhooks.retrieve(made.id).url == url
    changed = client.webhooks.update(made.id, name="other", event_types=["fine_tuning.job.failed"])
    assert (changed.name, changed.event_types) == ("other", ["fine_tuning.job.failed"])
    new = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    assert new.signing_secret != made.signing_secret
    assert client.webhooks.test(made.id, event_type=DONE).status_code == 200
    for secret in (made.signing_secret, new.signing_secret):  # both sign for a day
        assert client.webhooks.unwrap(receiver.got[0][1], receiver.got[0][0], secret=secret).data.id == "ftjob-test"
    last = client.webhooks.rotate_secret(made.id)
    client.webhooks.test(made.id, event_type=DONE)
    client.webhooks.unwrap(receiver.got[1][1], receiver.got[1][0], secret=last.signing_secret)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(receiver.got[1][1], receiver.got[1][0], secret=new.signing_secret)
    assert client.webhooks.event_types.list().data[0] == DONE
    assert client.webhooks.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.webhooks.retrieve(made.id)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://hooks.example.org/", "not https"),
        ("https://evil.test/", r"allowed by this server: 127\.0\.0\.1, \*\.example\.org"),
        ("https://user:pass@hooks.example.org/", "no user or password"),
        ("https://example.org.evil.test/", "allowed by this server"),
    ],
)
def test_a_url_is_refused(client, monkeypatch, url, said):
    monkeypatch.setenv("HAORI_WEBHOOK_HOSTS", '["127.0.0.1", "*.example.org"]')
    settings.cache_clear()
    with pytest.raises(openai.BadRequestError, match=said):
        client.webhooks.create(name="a", url=url, event_types=[DONE])


def test_nothing_is_sent_inside(client, monkeypatch):
    """An allowed name that leads to an address of this machine or its network."""
    monkeypatch.setenv("HAORI_WEBHOOK_HOSTS", '["localhost", "10.0.0.1", "169.254.169.254"]')
    settings.cache_clear()
    for host in ("localhost", "10.0.0.1", "169.254.169.254"):
        made = client.webhooks.create(name="a", url=f"https://{host}/", event_types=[DONE])
        with pytest.raises(openai.BadRequestError, match="not an address of the public internet"):
            client.webhooks.test(made.id, event_type=DONE)


def test_by_default_no_host_is_allowed(client):
    with pytest.raises(openai.BadRequestError, match="HAORI_WEBHOOK_HOSTS"):
        client.webhooks.create(name="a", url="https://hooks.example.org/", event_types=[DONE])
    with pytest.raises(openai.BadRequestError, match="https"):
        client.webhooks.create(name="a", url="ftp://hooks.example.org/", event_types=["batch.failed"])
