"""A real Jupyter kernel, driven as a front end drives it."""

from __future__ import annotations

import os
import queue
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Seconds in which a kernel starts, or answers, on a busy machine.
PATIENCE = 100.0


class Kernel:
    """
    One kernel of this interpreter, from ``with`` to the end of it.

    Args:
        directory: where it keeps what it keeps in a home otherwise.
        env: more variables of the kernel.
    """

    def __init__(self, directory: Path, env: dict[str, str] | None = None) -> None:
        from jupyter_client.manager import KernelManager

        self._directory = directory
        self._env = {**os.environ, "IPYTHONDIR": str(directory / "ipython"), **(env or {})}
        connection = directory / "runtime" / "kernel.json"
        connection.parent.mkdir(parents=True, exist_ok=True)
        self.manager = KernelManager(connection_file=str(connection))

    def __enter__(self) -> Kernel:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.manager.start_kernel(env=self._env, cwd=str(self._directory), **quiet)
        self._connect()
        return self

    def _connect(self) -> None:
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=PATIENCE)

    def __exit__(self, *_: object) -> None:
        self.client.stop_channels()
        if self.manager.has_kernel:
            self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()

    def start(self, code: str) -> str:
        """Begin to run a cell; the result names it for `messages` and `reply`."""
        return str(self.client.execute(code))

    def messages(self, cell: str) -> Iterator[dict[str, Any]]:
        """What the cell publishes, until it is idle again."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"the cell did not end within {PATIENCE:g} s") from None
            if message["parent_header"].get("msg_id") != cell:
                continue
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return
            yield message

    def reply(self, cell: str) -> dict[str, Any]:
        """How the cell ended."""
        while True:
            message = self.client.get_shell_msg(timeout=PATIENCE)
            if message["parent_header"].get("msg_id") == cell:
                return dict(message["content"])

    def run(self, code: str) -> Cell:
        """Run a cell to its end."""
        name = self.start(code)
        messages = list(self.messages(name))
        return Cell(messages, self.reply(name))

    def restart(self, *, now: bool) -> None:
        """As a front end does it: ask the kernel to end, or (*now*) kill it, and start another."""
        self.client.stop_channels()
        self.manager.restart_kernel(now=now)
        self._connect()


class Cell:
    """What a cell published and how it ended."""

    def __init__(self, messages: list[dict[str, Any]], reply: dict[str, Any]) -> None:
        self.reply = reply
        self.ok = reply["status"] == "ok"
        self.error = f"{reply.get('ename', '')}: {reply.get('evalue', '')}"
        self.text = "".join(m["content"]["text"] for m in messages if m["msg_type"] == "stream")
        self.pages = [
            m["content"]["data"].get("text/html", "")
            for m in messages
            if m["msg_type"] in ("display_data", "update_display_data", "execute_result")
        ]
