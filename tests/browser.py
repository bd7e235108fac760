"""A page as a browser lays it out at several widths: what is cut off, spilled, or covered by something else."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
MEASURE = """
const BLOCKS = "h1,h2,h3,p,pre,li,img,figcaption,.scroll,td,th"
const named = elements => elements.map(e => e.tagName + " " + e.textContent.trim().slice(0, 60))
const apart = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) < 2
  || Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) < 2
function measure(frame) {
  const page = frame.contentDocument, width = frame.contentWindow.innerWidth
  const overflow = e => frame.contentWindow.getComputedStyle(e).overflowX
  const blocks = [...page.querySelectorAll(BLOCKS)]
  const scrolled = e => !e.matches(".scroll") && e.closest(".scroll") && overflow(e.closest(".scroll")) == "auto"
  const places = blocks.filter(e => !e.matches(".scroll")).map(e => e.getBoundingClientRect()).filter(r => r.width)
  return {
    scroll: page.documentElement.scrollWidth,
    width,
    cut: named(blocks.filter(e => e.getBoundingClientRect().right > width + 1 && !scrolled(e))),
    spilled: named(blocks.filter(e => e.scrollWidth > e.clientWidth + 1 && overflow(e) == "visible")),
    covered: places.filter((a, i) => places.slice(Math.max(0, i - 30), i).some(b => !apart(a, b))).length,
  }
}
addEventListener("load", () => {
  document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(measure))
})"""


def lay_out(pages: Sequence[str], widths: Sequence[int], folder: Path) -> list[dict]:
    """For each page and width: that of the window and of the content; texts that are `cut` off by the window, or
    `spilled` out of their own box; how many blocks are `covered` by others."""
    frame = '<iframe style="width:{}px;height:800px;border:0" srcdoc="{}"></iframe>'
    frames = "".join(frame.format(width, html.escape(page)) for page in pages for width in widths)
    (folder / "frames.html").write_text(f"<script>{MEASURE}</script>{frames}")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", (folder / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))
