"""The report of a study: a page, its pictures and its numbers, in one directory."""

import importlib.util
from pathlib import Path

from kvframe.errors import ConfigError
from kvframe.eval.running import Results

__all__ = ["check_report_packages", "write_report"]

_PACKAGES = ("jinja2", "matplotlib", "scipy")


def check_report_packages() -> None:
    """Raise ConfigError where a package is missing that a report needs; better before a study than behind it."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"a report needs {' and '.join(missing)}; pip install 'kvframe[eval]'")


def write_report(results: Results, folder: str | Path) -> Path:
    """Write a study's report, and return the page.

    The page needs no other file. Beside it lie every picture as SVG and PNG, and the figures as CSV and, where pyarrow
    is installed, as Parquet.

    Raises ConfigError where the directory cannot be written, or a package is missing.
    """
    from kvframe.eval.report.export import write_tables
    from kvframe.eval.report.page import render

    check_report_packages()
    folder = Path(folder)
    try:
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        text, pictures = render(results, write_tables(results, folder))
        for picture in pictures:
            (folder / "pictures" / f"{picture.name}.svg").write_text(picture.svg, encoding="utf-8")
            (folder / "pictures" / f"{picture.name}.png").write_bytes(picture.png)
        page = folder / "index.html"
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the report to {folder}: {error}") from error
    return page
