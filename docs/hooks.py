"""Makes pages of the site from the Markdown that lies outside of docs/, with the links that it has in the repository.

Called by mkdocs (`hooks` in mkdocs.yml). In the site docs/ is the root, and other files keep their paths:
docs/concepts.md is concepts.md, bench/NOTES.md is bench/NOTES.md, and README.md is the start.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/NOTES.md", "bench/results/*.md")
OUTSIDE += ("vmoba_flex/demo/CREDITS.md",)
# What follows "](", but for addresses and anchors. Code is matched first, and left as it is.
_LINK = re.compile(r"^```.*?^```|`[^`]+`|(?<=\]\()(?![a-z]+:|#)(?P<path>[^)#]+)", re.DOTALL | re.MULTILINE)
# How tests run an example, after the language of its fence; the site's highlighter takes a language only.
_HOW_IT_RUNS = re.compile(r"^```python (?:no-run|torchrun)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside of docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links within the repository into links within the site, and leaves a fence its language only."""
    here = PurePosixPath(Path(str(page.file.abs_src_path)).relative_to(ROOT))
    site = PurePosixPath(page.file.src_uri).parent

    def relink(link: re.Match[str]) -> str:
        if link["path"] is None:
            return link[0]
        target = PurePosixPath(os.path.normpath(here.parent / link["path"]))
        target = target.relative_to("docs") if target.is_relative_to("docs") else target
        return os.path.relpath(target, site)

    return _LINK.sub(relink, _HOW_IT_RUNS.sub("```python", markdown))
