"""The documentation: numbers and pictures are current, and the site builds without a warning or a network."""

import bisect
import html.parser
import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import pages
from bench.models import tables
from tests.test_bench import ROOT
from vmoba_flex import BlockPartition, Threshold
from vmoba_flex.dispatch.choose import choose_backend, choose_dispatch

MARKDOWN = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "bench" / "NOTES.md"]
PICTURES = ROOT / "docs" / "pictures"
# Whatever asks the network anyway finds nobody there.
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


def test_numbers_are_those_of_the_results():
    stale = [str(page) for page in pages.PAGES if pages.filled(page.read_text()) != page.read_text()]
    assert not stale, f"run python -m bench.pages: {stale}"


def test_a_number_that_was_changed_by_hand_is_seen():
    text = (ROOT / "README.md").read_text()
    number = re.search(r"_attention -->([\d.]+)", text)
    assert number
    changed = text[: number.start(1)] + "99" + text[number.end(1) :]
    assert pages.filled(changed) == text


def test_no_mark_breaks_a_paragraph():
    """A line that starts with a comment is HTML of its own to Markdown."""
    broken = [str(page) for page in pages.PAGES if re.search(r"[^\n]\n<!-- results: ", page.read_text())]
    assert not broken


@pytest.mark.parametrize("mark", ["no_such_part h200_2026-11-24_attention", "dense no_such_file"])
def test_a_mark_that_names_nothing_is_an_error(mark: str):
    with pytest.raises((KeyError, FileNotFoundError), match="no_such"):
        pages.filled(f"<!-- results: {mark} --><!-- end -->")


def test_models_stand_next_to_the_full_attention_of_their_case():
    def row(tokens: int, attention: str, ms: float, status: str = "ok") -> dict[str, Any]:
        found = {"ms": ms, "peak_gb": ms / 1000} if status == "ok" else {}
        case = {"model": "Wan 1.3B", "mode": "training step", "tokens": tokens}
        return case | {"attention": attention, "status": status} | found

    rows = [row(100, "none", 1), row(100, "exact", 2000), row(2000, "shared", 4000), row(2000, "cuDNN", 8000)]
    rows += [row(100, "cuDNN", 5000), row(100, "FlashAttention-4", 4000), row(30, "cuDNN", 1000)]
    rows += [row(100, "shared", 1, "out of memory"), row(30, "exact", 1, "failed")]
    assert tables.wan({"rows": rows})[2:] == [
        "| training step | 2,000 | 8.00 |  |  | 4.00 (2.00x) | 8.0 /  / 4.0 |",
        "| training step | 100 | 5.00 | 4.00 | 2.00 (2.50x, 2.00x) |  | 5.0 / 2.0 /  |",
    ]


def test_the_page_says_where_auto_changes_over():
    page = (ROOT / "docs" / "performance.md").read_text()
    rows = re.findall(r"^\| (\d+) \([^|]*\) \|" + r" ([\d,]+) \|" * 4, page, re.MULTILINE)
    assert [int(heads) for heads, *_ in rows] == [12, 24, 40]
    for heads, *cells in rows:
        stated = [int(cell.replace(",", "")) for cell in cells]
        found = [
            _changes_over(int(heads), gradients, what) for what in ("packed", "flash") for gradients in (False, True)
        ]
        assert [round(tokens, -2) for tokens in found] == stated, heads


def _changes_over(heads: int, gradients: bool, to: str) -> int:
    """The fewest tokens, within ten, from which "auto" takes a dispatch or a backend."""

    def taken(tokens: int) -> str:
        partition = BlockPartition((tokens, 1, 1), (-(-tokens // 8), 1, 1))
        with FakeTensorMode(), mock.patch("vmoba_flex.dispatch.choose._flash_cannot_run", return_value=None):
            x = torch.empty(1, heads, tokens, 128, device="cuda", dtype=torch.bfloat16, requires_grad=gradients)
            if to == "packed":
                return choose_dispatch(x, x, x, partition, Threshold(0.25, max_density=0.25))[0]
            return choose_backend("auto", "packed", x, x, x, partition)[0]

    return 10 * bisect.bisect_left(range(10_000), True, key=lambda tens: tens > 0 and taken(10 * tens) == to)


def test_pictures_are_what_the_script_draws(tmp_path: Path):
    pinned = re.search(r"^matplotlib==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if pinned is None or importlib.metadata.version("matplotlib") != pinned[1]:
        pytest.skip("another matplotlib may draw other bytes")
    subprocess.run([sys.executable, "-m", "docs.pictures.draw", tmp_path], cwd=ROOT, check=True)
    drawn, kept = ({path.name: path.read_bytes() for path in place.glob("*.svg")} for place in (tmp_path, PICTURES))
    assert drawn.keys() == kept.keys()
    stale = [name for name in drawn if drawn[name] != kept[name]]
    assert not stale, f"run python -m docs.pictures.draw: {stale}"
    image = pytest.importorskip("PIL.Image")
    drawn, kept = (image.open(place / "demo_choice.png").convert("RGB") for place in (tmp_path, PICTURES))
    assert drawn.tobytes() == kept.tobytes()


@pytest.mark.parametrize("path", [*MARKDOWN], ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_name_their_columns_and_words_stay_whole(path: Path):
    text = path.read_text()
    headers = re.findall(r"^(\|.*\|)\n\|[ :|-]+\|$", text, re.MULTILINE)
    assert not [header for header in headers if re.search(r"\| *\|", header)]
    assert not re.findall(r"^.*[a-z]-$", text, re.MULTILINE)  # the site would put a space after the hyphen


class _Loads(html.parser.HTMLParser):
    """What a page makes a browser load, its anchors, its Python, and how many values each function returns."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.highlighted = 0
        self.returns: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors.add(found.get("id") or "")
        self.highlighted += "language-python highlight" in (found.get("class") or "")
        if tag != "a":
            self.loaded += [found[name] or "" for name in ("src", "href", "srcset", "data") if name in found]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, _Loads]:
    """Every page of the site by its path, built without a network and with warnings as errors."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | OFFLINE | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    built = {}
    for path in folder.rglob("*.html"):
        built[path.parent.relative_to(folder).as_posix()] = page = _Loads()
        page.feed(text := path.read_text())
        page.returns = [part.count("<li") for part in re.findall(r"Returns:</span>.*?</ul>", text, re.DOTALL)]
    return built


def test_site_loads_nothing_from_elsewhere(site: dict[str, _Loads]):
    assert len(site) > 20
    for name, page in site.items():
        assert any(link.endswith(".css") for link in page.loaded), name  # loads are seen at all
        assert not [link for link in page.loaded if re.match(r"(https?:)?//", link)], name


@pytest.mark.parametrize(
    "package", ["vmoba_flex", "vmoba_flex.distributed", "vmoba_flex.insight", "vmoba_flex.models", "block_masks"]
)
def test_every_public_name_is_in_the_reference(site: dict[str, _Loads], package: str):
    anchors = set().union(*(page.anchors for name, page in site.items() if name.startswith("api/")))
    top = package.partition(".")[0]
    documented = {anchor.rpartition(".")[2] for anchor in anchors if anchor.startswith(f"{top}.")}
    assert set(importlib.import_module(package).__all__) - {"__version__"} <= documented


def test_a_text_of_several_lines_is_one_value(site: dict[str, _Loads]):
    found = [count for name, page in site.items() if name.startswith("api/") for count in page.returns]
    assert len(found) > 15 and set(found) == {1}


def test_fences_of_python_are_highlighted(site: dict[str, _Loads]):
    for path in (ROOT / "docs" / "distributed.md", ROOT / "docs" / "models" / "wan.md", ROOT / "README.md"):
        name = path.relative_to(ROOT / "docs" if path.parent != ROOT else ROOT).with_suffix("").as_posix()
        fences = len(re.findall(r"^```python\b", path.read_text(), re.MULTILINE))
        assert fences and site["." if name == "README" else name].highlighted == fences, name


def test_what_the_repository_links_outside_of_docs_is_in_the_site(site: dict[str, _Loads]):
    assert {".", "CONTRIBUTING", "CHANGELOG", "bench/NOTES", "concepts", "models"} <= site.keys()


def test_links_become_the_sites_and_code_stays():
    files = pytest.importorskip("mkdocs.structure.files")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec and spec.loader
    spec.loader.exec_module(hooks := importlib.util.module_from_spec(spec))
    file = files.File("bench/NOTES.md", str(ROOT), "site", use_directory_urls=True)
    text = "[a](../docs/faq.md#b) [`c`](../CONTRIBUTING.md) [d](https://e.f) ![j](k.png)"
    text += " `g[h](../docs/i.md)`\n\n```python\nl[m](../docs/n)\n```\n```python no-run\no\n```\n"
    expected = text.replace("../docs/faq", "../faq").replace(" no-run", "")
    assert hooks.on_page_markdown(text, SimpleNamespace(file=file), None, None) == expected
