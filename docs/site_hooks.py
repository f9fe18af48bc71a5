"""What mkdocs needs to know of this repository: its pages outside of docs/, and the markup of its docstrings.

The site is built offline and read offline: formulas become MathML, which browsers draw without a script or a font.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md", "examples/README.md",
    *(f"examples/{path.name}" for path in sorted(ROOT.glob("examples/*.py"))),
]  # fmt: skip


def on_config(config: MkDocsConfig) -> None:
    config.markdown_extensions.append(Docstrings())


def on_files(files: Files, config: MkDocsConfig) -> None:
    """README.md becomes the first page; the others keep their places below it."""
    for name in OUTSIDE:
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links are those of the repository, where pages lie in docs/; those of the site have no docs/ in them."""
    place = page.file.src_uri if page.file.src_uri in OUTSIDE else f"docs/{page.file.src_uri}"

    def rewritten(match: re.Match[str]) -> str:
        before, path, after = match.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), path)).removeprefix("docs/")
        return before + posixpath.relpath(target, posixpath.dirname(page.file.src_uri)) + after

    return re.sub(r'(\]\(|src="|srcset=")(?!\w+:|[#/])([^)#"\s]+)((?:#[^)"\s]*)?[)"])', rewritten, markdown)


class Docstrings(Extension):
    """The markup of Sphinx that docstrings are written in, and ```math blocks."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        md.preprocessors.register(Markup(md), "sphinx", 28)  # before fenced code


class Markup(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        text = re.sub(r"^```math\n(.*?)^```$", self.block, "\n".join(lines), flags=re.M | re.S)
        # ".. math::", what follows it on its line, and all indented lines below.
        text = re.sub(r"^\.\. math::(.*(?:\n+ +\S.*)*)", self.block, text, flags=re.M)
        text = re.sub(r":math:`([^`]+)`", lambda m: self.formula(m[1], "inline"), text)
        text = re.sub(r":(?:func|class|meth|attr|mod|data):`([\w.]+)`", reference, text)
        text = re.sub(r"^>>> (?:.+\n?)+", lambda m: f"```pycon\n{m[0].rstrip()}\n```\n", text, flags=re.M)
        return re.sub(r"::$", ":", text, flags=re.M).split("\n")

    def block(self, match: re.Match[str]) -> str:
        return f"\n{self.formula(match[1], 'block')}\n"

    def formula(self, latex: str, display: str) -> str:
        return self.md.htmlStash.store(convert(" ".join(latex.split()), display=display))


def reference(match: re.Match[str]) -> str:
    """Names of this package have an anchor where the API pages name them."""
    name = match[1]
    return f"[`{name.rpartition('.')[2]}`][{name}]" if name.startswith("ssl_kernels.") else f"`{name}`"
