"""A server that does exactly what a test says, byte by byte: for what real servers do only on bad days."""

import json
import socket
import threading
from collections.abc import Callable

METADATA = {
    "name": "same",
    "versions": ["1"],
    "platform": "test",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1]}],
}


class Request:
    """One request as it came, and the means to answer it."""

    def __init__(self, connection: socket.socket, method: str, path: str, fields: dict[str, str], body: bytes) -> None:
        self.connection, self.method, self.path, self.fields, self.body = connection, method, path, fields, body

    @property
    def header(self) -> dict:
        """The JSON in front of the raw tensors."""
        length = int(self.fields.get("inference-header-content-length", len(self.body)))
        return json.loads(self.body[:length])

    @property
    def raw(self) -> bytes:
        return self.body[int(self.fields["inference-header-content-length"]) :]

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.connection.sendall(piece)

    def answer(self, status: int = 200, content: object = None, *fields: str, body: bytes | None = None) -> None:
        body = json.dumps(content if content is not None else {}).encode() if body is None else body
        lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(body)}", *fields, "", ""]
        self.send("\r\n".join(lines).encode() + body)

    def answer_same(self, raw: bytes | None = None) -> None:
        """Answer as the identity model does."""
        self.send(same(self.raw if raw is None else raw))


def same(raw: bytes) -> bytes:
    """The answer of an identity model to FP32 bytes, as it goes over the wire."""
    output = {"name": "y", "datatype": "FP32", "shape": [len(raw) // 4], "parameters": {"binary_data_size": len(raw)}}
    header = json.dumps({"model_name": "same", "model_version": "1", "outputs": [output]}).encode()
    head = (
        f"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: {len(header)}\r\nContent-Length: {len(header) + len(raw)}\r\n\r\n"
    )
    return head.encode() + header + raw


class WireServer:
    """Hands every request to `handle`, one thread per connection; a handler that returns False closes the connection."""

    def __init__(self, handle: Callable[[Request], object], *, extensions: tuple[str, ...] = (), port: int = 0) -> None:
        self.handle, self.extensions = handle, extensions
        self.infers = 0
        self.connected = 0
        self._listening = socket.create_server(("127.0.0.1", port))
        self.port = self._listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def drop(self) -> None:
        """Close every connection, as a server does that is started anew."""
        while self._open:
            _cut(self._open.pop())

    def stop_listening(self) -> None:
        """Take no more connections; what is open goes on."""
        _cut(self._listening)

    def close(self) -> None:
        self.stop_listening()
        self.drop()
        for thread in self._threads:
            thread.join(10)

    def __enter__(self) -> "WireServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.connected += 1
            self._open.append(connection)
            thread = threading.Thread(target=self._talk, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _talk(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            try:
                while self._one(connection, stream) is not False:
                    pass
            except (OSError, ValueError):
                pass

    def _one(self, connection: socket.socket, stream) -> object:
        first = stream.readline().decode()
        if not first:
            return False
        method, path, _ = first.split(" ", 2)
        fields = {}
        while line := stream.readline().decode().strip():
            name, _, value = line.partition(":")
            fields[name.lower()] = value.strip()
        request = Request(connection, method, path, fields, b"")
        if path.endswith("/infer"):
            self.infers += 1
            if self.handle_unread(request):
                return False
        request.body = stream.read(int(fields.get("content-length", 0)))
        if path == "/v2":
            return request.answer(content={"name": "wire", "version": "1", "extensions": list(self.extensions)})
        if path == "/v2/models/same":
            return request.answer(content=METADATA)
        return self.handle(request)

    def handle_unread(self, request: Request) -> bool:
        """Overridden by tests that answer before the body is read; True: the connection is closed."""
        return False


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    connection.close()
