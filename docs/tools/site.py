"""Hooks of mkdocs, so that pages read the same in the repository and on the site.

Files outside docs/ that pages link to are part of the site (`../benchmarks/refine.md` is `benchmarks/refine/`), and
formulas become MathML, which browsers show without a script.
"""

from __future__ import annotations

import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# what pages link to, of the folders that they may link into
SHOWN = ("benchmarks", "eval", "examples", "transmla/evaluation")
ENDINGS = (".md", ".png", ".json", ".html", ".toml", ".py", ".ipynb")
_BLOCK, _INLINE = re.compile(r"\$\$(.+?)\$\$", re.DOTALL), re.compile(r"(?<![\w$`])\$([^$`\n]+?)\$(?![\w$`])")
_PICTURE = re.compile(r'(<img [^>]*src="([^"]+)"[^>]*>)')
_LINK = re.compile(r"\]\(([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is linked to, and what that links to."""
    waiting = [file.src_uri for file in files if file.src_uri.endswith(".md")]
    while waiting:
        page = waiting.pop()
        for uri in _linked(page):
            if files.get_file_from_path(uri) is None:
                files.append(_outside(uri, config))
                if uri.endswith(".md"):
                    waiting.append(uri)
    return files


def _linked(page: str) -> list[str]:
    """Files outside docs/ that a page links to, relative to docs/."""
    docs = ROOT / "docs"
    found = []
    for link in _LINK.findall((docs / page).read_text("utf-8")):
        path = (docs / page).parent / link
        if "://" not in link and path.is_file() and path.suffix in ENDINGS:
            target = path.resolve().relative_to(ROOT)
            if target.parts[0] != "docs" and target.as_posix().startswith(SHOWN):
                found.append(f"../{target.as_posix()}")
    return list(dict.fromkeys(found))


def _outside(uri: str, config: MkDocsConfig) -> File:
    inner = uri.removeprefix("../")
    made = inner.removesuffix(".md") + "/index.html" if inner.endswith(".md") else inner
    return File(
        uri, str(ROOT / "docs"), config.site_dir, config.use_directory_urls, dest_uri=made,
        inclusion=InclusionLevel.NOT_IN_NAV,
    )  # fmt: skip


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas of the page about the method; elsewhere a dollar is a dollar."""
    if page.file.src_uri != "method.md":
        return markdown
    markdown = _BLOCK.sub(lambda found: convert(found[1].strip(), display="block"), markdown)
    return _INLINE.sub(lambda found: convert(found[1]), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A picture leads to itself: on a phone its words are too small to read where it stands."""
    return _PICTURE.sub(r'<a href="\2">\1</a>', html)
