"""A proxy in front of a server: it passes requests on, and loses the first reply of each address that is named."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx


@contextmanager
def losing_proxy(url, lost_of):
    """Yield the proxy's address, and what it passed on: (address, key) in order.

    Args:
        url: The server.
        lost_of: Last parts of addresses whose first reply is lost after the server has given it.
    """
    passed, left, lock = [], set(lost_of), threading.Lock()
    http = httpx.Client(base_url=url, timeout=60)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            given = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            answer = http.request(self.command, self.path, content=body, headers=given)
            name = self.path.rpartition("/")[2]
            with lock:
                passed.append((name, self.headers.get("x-idempotency-key")))
                lost = name in left and answer.status_code == 200
                left.discard(name)
            if lost:
                self.close_connection = True
                return
            self.send_response(answer.status_code)
            self.send_header("content-type", answer.headers.get("content-type", ""))
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_GET = do_POST = do_PUT = do_DELETE = pass_on

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", passed
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        http.close()
