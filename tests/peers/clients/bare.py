"""No peer but a ceiling: one blocking socket, a dictionary at its other end, no checksums, no eviction, no second client.

What the kernel's loopback carries between two processes at these sizes; whatever stores blocks behind a socket can at best be
as fast as this for large values. `bare.py serve PORT` is the server; started by the driver it is the client.

A request is a kind (1 get, 2 put, 3 exists, 4 forget), a count and a size, then as many numbers of keys, then for a put the
values. Answers: values for a get, a count for the others.
"""

import socket
import struct
import sys

HEAD = struct.Struct("<BxxxII")
BUFFER_BYTES = 4 << 20
GET, PUT, EXISTS, FORGET = 1, 2, 3, 4


def set_up(connection):
    """As our own bulk path sets up its sockets."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)


def fill(connection, view):
    while len(view):
        received = connection.recv_into(view, len(view), socket.MSG_WAITALL)
        if not received:
            raise EOFError
        view = view[received:]


def send(connection, parts):
    """All of `parts`, gathered."""
    parts = [memoryview(part) for part in parts]
    while parts:
        sent = connection.sendmsg(parts[:64])
        while parts and sent >= len(parts[0]):
            sent -= len(parts.pop(0))
        if parts:
            parts[0] = parts[0][sent:]


def serve_one(connection):
    held = {}
    head, count_of = bytearray(HEAD.size), struct.Struct("<I")
    while True:
        fill(connection, memoryview(head))
        kind, count, size = HEAD.unpack(head)
        numbers = bytearray(8 * count)
        fill(connection, memoryview(numbers))
        keys = struct.unpack(f"<{count}Q", numbers)
        if kind == GET:
            send(connection, [held[key] for key in keys])
            continue
        if kind == PUT:
            for key in keys:
                value = bytearray(size)
                fill(connection, memoryview(value))
                held[key] = value
        elif kind == FORGET:
            for key in keys:
                held.pop(key, None)
        connection.sendall(count_of.pack(sum(key in held for key in keys)))


def listen(port):
    with socket.create_server(("127.0.0.1", port)) as server:
        connection, _ = server.accept()
        with connection:
            set_up(connection)
            try:
                serve_one(connection)
            except (EOFError, ConnectionError):
                pass


class Bare:
    name, version = "bare", "socket"

    def __init__(self, settings):
        self.socket = socket.create_connection(("127.0.0.1", settings["port"]), timeout=30)
        set_up(self.socket)
        # Without a timeout of its own Python waits in the kernel for all of it.
        self.socket.settimeout(None)
        self.block_bytes = 0

    def prepare(self, block_bytes):
        if block_bytes != self.block_bytes:
            self.block_bytes = block_bytes
            self.noise = memoryview(noise(block_bytes + PAYLOADS * STEP))
            self.got = memoryview(bytearray(0))

    def number(self, key):
        name, number = key
        # Data sets of several sizes, and what is put beside them, are told apart.
        space = 0 if name.startswith("put-") else self.block_bytes
        return space << 32 | number

    def value(self, number):
        at = payload_at(number)
        return self.noise[at : at + self.block_bytes]

    def ask(self, kind, keys, values=()):
        numbers = struct.pack(f"<{len(keys)}Q", *map(self.number, keys))
        send(self.socket, [HEAD.pack(kind, len(keys), self.block_bytes), numbers, *values])

    def count(self):
        answer = bytearray(4)
        fill(self.socket, memoryview(answer))
        return struct.unpack("<I", answer)[0]

    def put(self, keys):
        self.ask(PUT, keys, [self.value(number) for _, number in keys])
        self.count()

    def settle(self, _key):
        """A put is acknowledged."""

    def get(self, keys):
        wanted = len(keys) * self.block_bytes
        if len(self.got) != wanted:
            self.got = memoryview(bytearray(wanted))
        self.ask(GET, keys)
        fill(self.socket, self.got)
        return self.got

    def check(self, keys, got):
        for i, (key, number) in enumerate(keys):
            if got[i * self.block_bytes : (i + 1) * self.block_bytes] != self.value(number):
                raise ValueError(f"{key} has other bytes than were put")
        return len(keys)

    def exists(self, keys):
        self.ask(EXISTS, keys)
        return self.count()

    def forget(self, keys):
        for first in range(0, len(keys), 4096):
            self.ask(FORGET, keys[first : first + 4096])
            self.count()


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        listen(int(sys.argv[2]))
    else:
        from driver import PAYLOADS, STEP, noise, payload_at, serve

        serve(Bare)
