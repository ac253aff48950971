"""
A process that asks a server, and opens connections to it that stand in several states, for tests of broken networks.

Run with the server's URL and a token.  Each line of standard input is an order in JSON, each line of standard output
the answer to one.  The connections last as long as the process does.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
from typing import Any
from urllib.parse import urlsplit

#: What connections that are opened stand in the middle of.
STATES = ("nothing sent", "half a head", "half a body", "idle after an answer", "a long poll with a ticket")


class Asker:
    def __init__(self, url: str, token: str) -> None:
        place = urlsplit(url)
        self.address = (place.hostname, place.port)
        self.headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self.kept: list[Any] = []

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self.address, timeout=30)

    def exchange(self, connection: http.client.HTTPConnection, method: str, path: str, document: Any = None) -> list:
        body = None if document is None else json.dumps(document)
        connection.request(method, path, body, self.headers)
        answer = connection.getresponse()
        return [answer.status, json.loads(answer.read())]

    def ask(self, method: str, path: str, document: Any = None) -> list:
        """On a connection of its own: status and document."""
        connection = self.connection()
        try:
            return self.exchange(connection, method, path, document)
        finally:
            connection.close()

    def open(self, number: int, claims: list[dict], timeout: float) -> int:
        """So many connections of each state; the waiters make these claims first, and wait so long."""
        for which in range(number):
            for state in STATES:
                connection = self.connection()
                connection.connect()
                self.kept.append(connection)
                if state == "half a head":
                    connection.sock.sendall(b"GET /health HTTP/1.1\r\nHost:")
                elif state == "half a body":
                    head = [f"{name}: {value}\r\n" for name, value in self.headers.items()]
                    text = f"POST /v1/leases HTTP/1.1\r\nHost: x\r\n{''.join(head)}Content-Length: 1000\r\n\r\n{{"
                    connection.sock.sendall(text.encode())
                elif state == "idle after an answer":
                    assert self.exchange(connection, "GET", "/health")[0] == 200
                elif state == "a long poll with a ticket":
                    assert self.exchange(connection, "POST", "/v1/leases", claims[which])[0] == 202
                    wait = {"holder": claims[which]["holder"]["id"], "timeout": timeout}
                    connection.request("POST", "/v1/wait", json.dumps(wait), self.headers)
        return len(self.kept)


def main() -> None:
    socket.setdefaulttimeout(30)
    asker = Asker(*sys.argv[1:])
    for line in sys.stdin:
        order, *arguments = json.loads(line)
        print(json.dumps(getattr(asker, order)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
