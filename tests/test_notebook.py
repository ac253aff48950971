"""``%gpu`` in a real kernel, and what it shows in a real browser."""

from __future__ import annotations

import asyncio
import importlib.util
import re
from pathlib import Path

import pytest

from browser import execute, look, needs_browser, page_of
from gpupool_sync import GPUPool
from gpupool_sync.testing import FakeFleet
from helpers import eventually
from notebook_kernel import Kernel

MISSING = [name for name in ("ipykernel", "nbclient", "nbconvert") if importlib.util.find_spec(name) is None]

pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]

EXAMPLE = Path(__file__).parent.parent / "examples" / "notebook.ipynb"
EVIL = "<img src=x onerror='window.pwned=1'>"


@pytest.fixture(scope="module", autouse=True)
def _no_event_loop_left_behind():
    """Jupyter's clients leave one to the thread, whose descriptors the children of later tests would inherit."""
    yield
    from jupyter_core.utils import ensure_event_loop

    ensure_event_loop().close()
    asyncio.set_event_loop(None)


@pytest.fixture(scope="module")
def fleet():
    with FakeFleet(["2xA100"], names=["alpha"]) as servers:
        yield servers


@pytest.fixture
def pool(fleet):
    with GPUPool([f"alpha={fleet[0].url}"], poll_interval=0.2) as watching:
        watching.open(wait=True)
        yield watching


@pytest.fixture(scope="module")
def running_kernel(fleet, tmp_path_factory):
    # With a short ttl a holder hears soon of a revocation: at its next renewal.
    env = {"GPU_SERVICE_ENDPOINTS": f"alpha={fleet[0].url}", "GPU_POLLING_INTERVAL": "0.2", "GPU_POOL_TTL": "9"}
    # What we do in a kernel must not warn; what others do there is not our business.
    env["PYTHONWARNINGS"] = "error:::gpupool_sync"
    with Kernel(tmp_path_factory.mktemp("kernel"), env) as kernel:
        yield kernel


@pytest.fixture
def kernel(running_kernel, pool):
    """A kernel with the extension, which holds nothing."""
    assert running_kernel.run("%load_ext gpupool_sync.notebook").ok
    yield running_kernel
    running_kernel.run("%gpu release\nfrom gpupool_sync.pool import _pools\nfor each in list(_pools): each.close()")
    eventually(lambda: not pool.leases().leases)


def holders(pool):
    return [lease.holder for lease in pool.leases().leases]


def test_gpu_is_acquired_activated_and_released(kernel, pool):
    """One line gives the notebook a GPU that CUDA will see, and one takes it back."""
    cell = kernel.run("gpu = %gpu --model a100 --note 'two words'\ngpu")
    assert cell.ok, cell.error
    assert re.search(r"alpha:\d is this notebook's, as cuda:0", cell.text)
    assert "held, for" in cell.pages[-1]
    (lease,) = pool.leases().leases
    assert lease.note == "two words"
    seen = kernel.run("import os; print(os.environ['CUDA_VISIBLE_DEVICES'] == gpu.uuid)")
    assert seen.text == "True\n"

    assert re.search(r"this kernel holds alpha:\d \(for ", kernel.run("%gpu status").text)
    assert re.match(r"released alpha:\d", kernel.run("%gpu release").text)
    assert holders(pool) == []
    assert kernel.run("print('CUDA_VISIBLE_DEVICES' in os.environ)").text == "False\n"
    assert "holds no GPU" in kernel.run("%gpu status").text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--modle A100", "no option --modle; --model may be meant"),
        ("--model RTX 4090", "'4090' is none of acquire, release, status; a value with spaces needs quotation marks"),
        ("relase", "'relase' is none of acquire, release, status"),
        ("--timeout 5s", "invalid float value: '5s'"),
        ("status --busy-ok", "status takes no options"),
    ],
)
def test_a_mistyped_line_says_what_is_wrong(line, words):
    """Not what a parser makes of it."""
    from IPython.core.error import UsageError

    from gpupool_sync.notebook import NotebookGPU

    with pytest.raises(UsageError) as caught:
        NotebookGPU(print).magic(line)
    assert words in str(caught.value)


def test_a_cell_that_is_run_again_gets_what_the_notebook_has(kernel, pool):
    """It says so, and never waits for itself."""
    assert kernel.run("%gpu --model a100").ok
    again = kernel.run("%gpu --model a100")
    assert again.ok, again.error
    assert re.match(r"still holding alpha:\d, for ", again.text)
    assert len(holders(pool)) == 1

    other = kernel.run("%gpu -n 2")
    assert "UsageError: this notebook still holds alpha:" in other.error
    assert "UsageError" in kernel.run("%gpu --bogus").error
    assert "UsageError" in kernel.run("%gpu release --model x").error
    assert "--max-holders" in kernel.run("%gpu --help").text


def test_a_cell_that_acquires_again_is_told_what_its_first_run_holds(kernel, pool):
    """Without `%gpu` too: the handle of the first run is overwritten, its lease is not."""
    kernel.run("from gpupool_sync import GPUPool; own = GPUPool()")
    assert kernel.run("mine = own.acquire()").text == ""
    first = pool.leases().leases[0].gpus[0]
    again = kernel.run("mine = own.acquire()")

    assert f"still held from an earlier run of it: {first} (for " in again.text
    assert len(holders(pool)) == 2
    assert "still held" not in kernel.run("print('another cell')").text


def test_a_lease_that_is_lost_is_replaced(kernel, pool):
    """What was taken from a notebook it asks for anew, and says so."""
    assert kernel.run("gpu = %gpu").ok
    pool.revoke(pool.leases().leases[0].gpus[0])
    eventually(lambda: kernel.run("print(gpu.lost)").text == "True\n")
    cell = kernel.run("%gpu --timeout 20")

    assert cell.ok, cell.error
    assert "was lost" in cell.text
    assert "is this notebook's" in cell.text


def test_a_wait_is_shown_and_an_interrupt_ends_it_at_once(kernel, pool):
    """Place, holder and reason, in one output that is drawn anew and is empty at the end."""
    with pool.gpus(2, note=EVIL):
        cell = kernel.start("%gpu")
        shown: list[dict] = []
        for message in kernel.messages(cell):
            if message["msg_type"] in ("display_data", "update_display_data"):
                shown.append(message["content"])
            if len(shown) == 2:
                kernel.manager.interrupt_kernel()
                break
        rest = [each["content"] for each in kernel.messages(cell) if each["msg_type"] == "update_display_data"]
        assert kernel.reply(cell)["ename"] == "KeyboardInterrupt"
        assert len(rest) <= 10, "it went on waiting"
        assert pool.leases().queue == [], "nothing is left in the queue"

    assert len({each["transient"]["display_id"] for each in [*shown, *rest]}) == 1
    page = shown[0]["data"]["text/html"]
    assert "place 1 in the queue" in page
    assert "held by" in page
    assert "<img" not in page
    assert rest[-1]["data"]["text/html"] == ""
    assert kernel.run("%gpu --timeout 20").ok, "and it can ask again"


def test_a_wait_that_ends_leaves_no_display(kernel, pool):
    """Granted or timed out, the output is emptied; the error says why, card by card."""
    with pool.gpus(2):
        cell = kernel.run("%gpu --timeout 8")
    assert re.match(r"AcquireTimeout: one GPU: none could be had within \d+\.\d s", cell.error)
    assert "place 1" in cell.pages[0]
    assert cell.pages[-1] == ""


def test_progress_can_be_refused(kernel, pool):
    """By the argument, in the notebook's own pool."""
    kernel.run("from gpupool_sync import GPUPool; own = GPUPool(progress=False)")
    with pool.gpus(2):
        cell = kernel.run("own.acquire(timeout=2.5)")
    assert cell.error.startswith("AcquireTimeout")
    assert cell.pages == []


@pytest.mark.parametrize("now", [False, True], ids=["asked", "killed"])
def test_a_restart_gives_back(fleet, tmp_path, monkeypatch, now):
    """
    Of a kernel that is asked to end at once, whoever arbitrates; of one that is killed, kernel locks do.

    With a server, a killed kernel's lease lasts until its ttl ends: nobody has told the server.
    """
    env = {"GPU_SERVICE_ENDPOINTS": f"alpha={fleet[0].url}"}
    store = None
    if now:
        store = env["GPU_POOL_LEASE_STORE"] = f"host:{tmp_path / 'locks'}"
    with (
        GPUPool([f"alpha={fleet[0].url}"], poll_interval=0.2, lease_store=store) as pool,
        Kernel(tmp_path, env) as kernel,
    ):
        assert kernel.run("%load_ext gpupool_sync.notebook\n%gpu").ok
        assert len(holders(pool)) == 1
        kernel.restart(now=now)
        # Before a lease with a ttl of 60 s could have expired by itself.
        eventually(lambda: not holders(pool), 20.0)
        assert kernel.run("%load_ext gpupool_sync.notebook\n%gpu --timeout 20").ok
        assert len(holders(pool)) == 1
        kernel.client.stop_channels()
        kernel.manager.shutdown_kernel()
        eventually(lambda: not holders(pool), 20.0)


def test_a_forked_child_of_a_kernel_shows_nothing(kernel, pool):
    """It has the parent's shell, but the front end does not listen to it."""
    code = (
        "import os\n"
        "from gpupool_sync import progress\n"
        "here = progress.in_kernel()\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(progress.in_kernel())\n"
        "print(here, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert kernel.run(code).text.endswith("True 0\n")


@pytest.mark.checkout
def test_the_example_runs(tmp_path):
    """As it stands, on a machine without a GPU."""
    import nbformat

    notebook = execute(nbformat.read(EXAMPLE, as_version=4), tmp_path)

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert re.search(r"beta:\d is this notebook's", text)
    assert re.search(r"released beta:\d", text)


@pytest.mark.parametrize("theme", ["light", "dark"])
@needs_browser[0]
@needs_browser[1]
def test_a_browser_shows_the_tables(fleet, tmp_path, theme):
    """Every cell is there and can be read on the page of either theme, and no foreign name runs as a script."""
    cells = [
        f"from gpupool_sync import GPUPool; pool = GPUPool('alpha={fleet[0].url}')",
        f"pool.acquire(note={EVIL!r})",
        "pool.status()",
        "pool.explain(min_free_memory_mb=1e6)",
        "pool.leases()",
        "pool.close(); pool",
    ]
    from nbformat import v4

    notebook = v4.new_notebook(cells=[v4.new_code_cell(cell) for cell in cells])
    facts = look(page_of(execute(notebook, tmp_path), theme), tmp_path)

    assert facts["run"] == 0
    assert facts["displays"] == 5
    assert facts["visible"]
    assert facts["aligned"]
    assert facts["dark"] == (theme == "dark")
    assert facts["contrast"] >= 4.5, "WCAG AA for text"
    assert facts["marks"] >= 3.0, "WCAG AA for signs"
    held = [row for row in facts["rows"] if row and EVIL in row[-1]]
    assert held
    assert held[0][0].startswith("alpha:")
