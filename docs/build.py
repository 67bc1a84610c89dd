"""What MkDocs does not do by itself: pages of the files outside of docs/ that are linked to, and the docstrings' roles."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()((?:\.\./)+[\w./-]+)(?=[#)])")
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`(~?)([\w.]+)`")
EXAMPLE = re.compile(r"^Example::\n((?:\n|    .*(?:\n|$))+)", re.MULTILINE)


def outside(target: str, page: str) -> str | None:
    """Where a page's link leads, from the repository's root, if that is a file of it outside of docs/."""
    path = Path(os.path.normpath(ROOT / "docs" / Path(page).parent / target))
    inside = path.is_relative_to(ROOT / "docs") or not path.is_relative_to(ROOT)
    return None if inside or not path.is_file() else path.relative_to(ROOT).as_posix()


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file that a page links to."""
    for page in list(files.documentation_pages()):
        for target in LINK.findall(page.content_string):
            name = outside(target, page.src_uri)
            if name is not None and files.get_file_from_path(f"source/{name}.md") is None:
                code = (ROOT / name).read_text(encoding="utf-8")
                text = f"---\nsearch:\n  exclude: true\n---\n# {name}\n\n``````{Path(name).suffix[1:]}\n{code}``````\n"
                files.append(File.generated(config, f"source/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead the links to those pages."""

    def link(match: re.Match[str]) -> str:
        name = outside(match[1], page.file.src_uri)
        return match[1] if name is None else os.path.relpath(f"source/{name}.md", Path(page.file.src_uri).parent)

    return LINK.sub(link, markdown)


class Docstrings(griffe.Extension):
    """Roles of Sphinx, and examples, in Markdown."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is None:
            return
        text = re.sub(r":math:`([^`]+)`", r"`\1`", obj.docstring.value)
        text = EXAMPLE.sub(lambda m: f"**Example**\n\n```python\n{textwrap.dedent(m[1]).strip()}\n```\n", text)
        obj.docstring.value = ROLE.sub(lambda m: self.reference(obj, m[2], short=bool(m[1])), text)

    @staticmethod
    def reference(obj: griffe.Object, name: str, short: bool) -> str:
        """A link to what is named, where it is on the site; its name elsewhere."""
        owner: Any = obj
        target = name
        while "." not in name and owner is not None:
            if name in owner.members:
                target = f"{owner.path}.{name}"
                break
            owner = owner.parent
        shown = name.rpartition(".")[2] if short else name
        return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'
