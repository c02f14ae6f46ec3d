"""The thread of a server that tells endpoints of jobs that ended; what it has not sent, the next server sends."""

import sys
import threading

from haori.core.errors import HaoriError
from haori.jobs.database.connection import in_full
from haori.jobs.webhooks.sending import send
from haori.jobs.webhooks.store import Delivery, WebhookStore

__all__ = ["Deliverer"]


class Deliverer:
    """Sends what is due, from its start until it is closed.

    Args:
        store: Endpoints and deliveries.
        every_s: How often jobs that ended are looked for.
    """

    def __init__(self, store: WebhookStore, every_s: float = 2.0) -> None:
        self._store, self._every_s = store, every_s
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="haori-webhooks", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send nothing more; a delivery under way is waited for."""
        self._ending.set()
        self._thread.join(20.0)

    def _run(self) -> None:
        while not self._ending.wait(self._every_s):
            try:
                self._store.gather()
                for delivery in self._store.due():
                    if self._ending.is_set():
                        return
                    self._deliver(delivery)
            except HaoriError as error:  # the database, for now
                print(f"Warning: webhooks wait: {in_full(error)}", file=sys.stderr)

    def _deliver(self, delivery: Delivery) -> None:
        problem: str | None = None
        try:
            webhook = self._store.find(delivery.webhook_id, None)
            status = send(webhook.url, webhook.signing, delivery.id, delivery.event)
            problem = None if 200 <= status < 300 else f"The reply was {status}."
        except HaoriError as error:
            problem = str(error)
        self._store.settle(delivery, problem)
