"""
Notebooks seen in a real browser: Chromium without a window, which reaches nothing but the file it is given.

``python tests/browser.py`` runs ``examples/notebook.ipynb`` and makes ``docs/notebook.png`` of it.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_browser = [
    pytest.mark.external_service,
    pytest.mark.skipif(PROGRAM is None, reason="chromium is not installed"),
]

#: Put at the end of a page: what the browser made of our displays.  Contrast is that of WCAG 2.
_LOOK = """
<pre id="facts"></pre>
<script>
const channel = c => c <= 10.31475 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
const rgba = text => { const n = text.match(/[0-9.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
const behind = e => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
                      if (c[3] > 0.99) return c; } return [255, 255, 255, 1]; };
const contrast = e => { const a = light(rgba(getComputedStyle(e).color)), b = light(behind(e));
                        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); };
const seen = e => { const box = e.getBoundingClientRect(); return box.width > 0 && box.height > 0; };
const cells = [...document.querySelectorAll(".gpupool-sync td, .gpupool-sync th")];
const marks = [...document.querySelectorAll(".gpupool-sync span")];
window.addEventListener("load", () => {
  document.getElementById("facts").textContent = JSON.stringify({
    displays: document.querySelectorAll(".gpupool-sync").length,
    rows: [...document.querySelectorAll(".gpupool-sync tr")].map(r => [...r.cells].map(c => c.innerText)),
    visible: cells.every(seen),
    aligned: cells.every(c => ["left", "right"].includes(getComputedStyle(c).textAlign)
                              && (c.style.textAlign === getComputedStyle(c).textAlign)),
    contrast: Math.min(...cells.map(contrast)),
    marks: Math.min(...marks.map(contrast)),
    dark: light(behind(document.querySelector(".gpupool-sync"))) < 0.2,
    run: window.pwned === undefined ? 0 : window.pwned,
  });
});
</script>
"""


def page_of(notebook: Any, theme: str) -> str:
    """The executed notebook as JupyterLab shows it, "light" or "dark"."""
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter(template_name="lab", theme=theme).from_notebook_node(notebook)
    return str(page)


def look(page: str, directory: Path) -> dict[str, Any]:
    """What a browser makes of the page, with its scripts run."""
    dom = _browse(page.replace("</body>", f"{_LOOK}</body>"), directory, "--dump-dom")
    found = re.search(r'<pre id="facts">(.+?)</pre>', dom, re.DOTALL)
    assert found is not None, dom[-2000:]
    return dict(json.loads(html.unescape(found.group(1))))


def _browse(page: str, directory: Path, *options: str) -> str:
    assert PROGRAM is not None
    file = directory / "page.html"
    file.write_text(page, encoding="utf-8")
    done = subprocess.run(
        [
            *(PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
            # nbconvert's pages name scripts of other sites.
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--no-first-run"),
            f"--user-data-dir={directory / 'profile'}",
            *options,
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def execute(notebook: Any, directory: Path) -> Any:
    """Run every cell in a kernel of this interpreter; an error in a cell is raised."""
    from nbclient import NotebookClient

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_RUNTIME_DIR", str(directory / "runtime"))
        patch.setenv("IPYTHONDIR", str(directory / "ipython"))
        NotebookClient(notebook, timeout=50, resources={"metadata": {"path": str(directory)}}).execute()
    return notebook


def main() -> None:
    import nbformat

    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        notebook = execute(nbformat.read(root / "examples" / "notebook.ipynb", as_version=4), directory)
        png = root / "docs" / "notebook.png"
        _browse(page_of(notebook, "light"), directory, f"--screenshot={png}", "--window-size=900,780")
    print(png)


if __name__ == "__main__":
    sys.exit(main())
