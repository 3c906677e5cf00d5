"""The site builds without a warning, its links lead somewhere, and it fetches nothing from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

REPO = Path(__file__).resolve().parents[2]
DOCS = REPO / "docs"
# Written as they stand on disk: `kvframe/hf/`, `kernels/kvframe_kernels/kmeans/reference.py`.
_PATH = re.compile(r"`((?:kvframe\w*|kernels|tests|docs|benchmarks|examples)/[\w./-]*)`")
_METHOD = re.compile(r"`([A-Z]\w+)\.(_?[a-z]\w+)`")


class Links(HTMLParser):
    """What a page refers to, and what can be referred to in it."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = {""}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attributes if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if "src" in given:
            self.loaded.append(given["src"])
        if tag == "link" and "href" in given:
            self.loaded.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as a reader of the README would build it."""
    folder = tmp_path_factory.mktemp("site")
    # a process of its own: mkdocs and its theme change logging and print notices of their own
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=REPO,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    """Every page of the site, read."""
    found = {}
    for path in site.rglob("*.html"):
        found[path] = Links()
        found[path].feed(path.read_text(encoding="utf-8"))
    return found


def test_every_page_is_built(pages: dict[Path, Links], site: Path) -> None:
    """Each Markdown file is a page of the site."""
    built = {path.relative_to(site).with_suffix("").as_posix() for path in pages} - {"404"}

    assert built == {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")}


def test_internal_links_resolve(pages: dict[Path, Links]) -> None:
    """Links inside the site end at a page, and at an anchor of it where they name one."""
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # written for the root of a server
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            anchors = pages[target].anchors if target in pages else {""}
            if not target.exists() or unquote(parts.fragment) not in anchors:
                broken.append(f"{path.name}: {link}")

    assert broken == []


def test_nothing_is_fetched_from_elsewhere(pages: dict[Path, Links]) -> None:
    """Scripts, styles, fonts and pictures are the site's own, so that it reads the same without a network."""
    foreign = {url for page in pages.values() for url in page.loaded if urlsplit(url).netloc}

    assert foreign == set()


def test_pictures_are_complete() -> None:
    """Each picture is used, says what it shows, and refers to nothing outside itself."""
    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))
    for picture in (DOCS / "img").glob("*.svg"):
        drawing = picture.read_text(encoding="utf-8")

        assert f"img/{picture.name}" in text
        assert "<title" in drawing and "<desc" in drawing
        assert "href" not in drawing and "url(http" not in drawing


def test_readme_links_into_the_docs() -> None:
    """Files that the README links to are there."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (REPO / "README.md").read_text(encoding="utf-8"))

    assert [link for link in links if not (REPO / link).exists()] == []


@pytest.mark.parametrize("page", sorted([*DOCS.rglob("*.md"), REPO / "README.md"]), ids=lambda page: page.stem)
def test_named_files_exist(page: Path) -> None:
    """A file or folder of the repository that a page names is there."""
    named = _PATH.findall(page.read_text(encoding="utf-8"))

    assert [name for name in named if not (REPO / name).exists()] == []


def test_named_methods_exist() -> None:
    """A method that a page names as `Class.method` is somewhere in the sources, and so is its class."""
    sources = "".join(
        path.read_text(encoding="utf-8")
        for package in ("kvframe", "kvframe_louis", "kvframe_baselines", "kernels")
        for path in (REPO / package).rglob("*.py")
    )
    named = {pair for page in DOCS.rglob("*.md") for pair in _METHOD.findall(page.read_text(encoding="utf-8"))}
    missing = [
        f"{cls}.{name}"
        for cls, name in sorted(named)
        if not re.search(rf"^class {cls}\b", sources, re.M) or not re.search(rf"^    (def )?{name}\b", sources, re.M)
    ]

    assert missing == []
