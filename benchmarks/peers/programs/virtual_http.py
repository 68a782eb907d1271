"""A `VirtualServer` as one model, `virtual`, of a v2 server over HTTP/1.1; no more of the protocol than a load needs.

One argument, a JSON object: kind, seed, requests, rate_per_s. Prints its port, and ends when its standard input does. One
thread; waits to the microsecond, which asyncio's timers (whole milliseconds) do not.
"""

import heapq
import json
import select
import socket
import sys
import time

from procs import ask_for_real_time
from virtual_latency import VirtualServer

METADATA = json.dumps(
    {
        "name": "virtual",
        "platform": "none",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 1]}],
    }
).encode()
ANSWER = b'{"model_name":"virtual","outputs":[{"name":"y","datatype":"FP32","shape":[1,1],"data":[0.0]}]}'


def framed(body):
    """Return an answer of HTTP."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def whole(buffer):
    """Return how long the request at the start of a buffer is, 0 when it is not all there."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return 0
    length = 0
    for line in bytes(buffer[:end]).split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return end + 4 + length if len(buffer) >= end + 4 + length else 0


def main():
    """Serve until the standard input ends."""
    ask_for_real_time()
    server = VirtualServer(**json.loads(sys.argv[1]))
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    listener.setblocking(False)
    epoll = select.epoll()
    epoll.register(listener, select.EPOLLIN)
    epoll.register(sys.stdin, select.EPOLLIN | select.EPOLLHUP)
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    opened, buffers, due = {}, {}, []
    answer, metadata, number = framed(ANSWER), framed(METADATA), 0
    while True:
        now_s = time.perf_counter()
        while due and due[0][0] <= now_s:
            _, _, fd = heapq.heappop(due)
            if fd in opened:
                opened[fd].send(answer)
        timeout_s = max(0.0, due[0][0] - time.perf_counter()) if due else 1.0
        if not select.select([epoll], [], [], timeout_s)[0]:
            continue
        for fd, _ in epoll.poll(0):
            if fd == sys.stdin.fileno():
                return
            if fd == listener.fileno():
                while True:
                    try:
                        connection, _ = listener.accept()
                    except BlockingIOError:
                        break
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    opened[connection.fileno()], buffers[connection.fileno()] = connection, bytearray()
                    epoll.register(connection, select.EPOLLIN)
                continue
            arrived_s = time.perf_counter()
            try:
                data = opened[fd].recv(65_536)
            except ConnectionError:
                data = b""
            if not data:
                epoll.unregister(fd)
                opened.pop(fd).close()
                del buffers[fd]
                continue
            buffers[fd] += data
            while length := whole(buffers[fd]):
                request = bytes(buffers[fd][:length])
                del buffers[fd][:length]
                if request.startswith(b"POST"):
                    number += 1
                    heapq.heappush(due, (server.answer_s(arrived_s), number, fd))
                else:
                    opened[fd].send(metadata)


if __name__ == "__main__":
    main()
