"""The documentation as a site: it builds without a warning, its links are alive, and it needs nothing from elsewhere."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import lightning_fgsgd
from tests.pages import DOCS, ROOT

for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
    pytest.importorskip(name, reason="of the docs extra")


class Reader(HTMLParser):
    """The anchors of a page, its links, and what a browser loads for it; its text, but for code."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded, self.text, self._open = set(), [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self._open.append(tag)
        self.ids.add(attrs.get("id"))
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag in ("script", "img") and attrs.get("src"):
            self.loaded.append(attrs["src"])
        if tag == "link" and attrs.get("rel") in ("stylesheet", "icon"):
            self.loaded.append(attrs["href"])

    def handle_endtag(self, tag):
        while tag in self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"code", "script", "style"} & set(self._open):
            self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path: Reader(path) for path in folder.rglob("index.html")}


def page(site, name):
    return next(reader for path, reader in site.items() if path.parent.name == name)


@pytest.mark.slow
def test_it_builds_without_a_warning_and_has_every_page(site):
    (root,) = (path.parent for path in site if all(path.parent in other.parents for other in site))
    built = {path.parent.relative_to(root).as_posix() for path in site}
    written = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")}
    assert {"." if name == "index" else name for name in written} <= built


@pytest.mark.slow
def test_every_link_within_it_leads_to_a_page_and_an_anchor_that_are_there(site):
    looked = 0
    for path, reader in site.items():
        for link in [*reader.links, *reader.loaded]:
            target, anchor = urldefrag(link)
            if re.match(r"\w+:", link) or target.startswith("/"):
                continue
            found = path if not target else Path(path.parent, unquote(target)).resolve()
            found = found / "index.html" if found.is_dir() else found
            assert found.exists(), (path, link)
            if anchor and found in site:
                assert unquote(anchor) in site[found].ids, (path, link)
            looked += 1
    assert looked > 1000


@pytest.mark.slow
def test_it_loads_nothing_from_elsewhere(site):
    assert [link for reader in site.values() for link in reader.loaded if re.match(r"(\w+:)?//", link)] == []


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site):
    names = {f"lightning_fgsgd.{name}" for name in lightning_fgsgd.__all__ if name != "__version__"}
    assert names <= page(site, "reference").ids


@pytest.mark.slow
def test_the_reference_shows_none_of_the_docstrings_markup(site):
    text = "".join(page(site, "reference").text)
    assert re.findall(r":(?:class|func|meth|mod|attr|data|math):|``|\.\. \w+::|\w::$", text, flags=re.MULTILINE) == []


@pytest.mark.slow
def test_links_to_sources_lead_to_a_page_with_the_whole_source(site):
    (source,) = (path for path in site if path.parent.as_posix().endswith("source/lightning_fgsgd/stepsize.py"))
    shown = re.sub(r"<[^>]+>", "", source.read_text(encoding="utf-8"))
    assert "def step_normalizer(grad_norm: Tensor" in shown
    assert "gamma2 = (" in shown
