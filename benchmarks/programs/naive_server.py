"""What many would write: an inference server of the standard library that trusts what it reads. `serve_fuzz` breaks it."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np


class Handler(BaseHTTPRequestHandler):
    """Gives back what it was sent."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Answer an inference request."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        length = int(self.headers.get("Inference-Header-Content-Length", len(body)))
        (tensor,) = json.loads(body[:length])["inputs"]
        raw = body[length:] or np.array(tensor["data"], "f4").tobytes()
        values = np.frombuffer(raw, "f4").reshape(tensor["shape"])
        self.send_response(200)
        self.send_header("Content-Length", str(values.nbytes))
        self.end_headers()
        self.wfile.write(values.tobytes())


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
