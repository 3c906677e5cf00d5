"""Which files there are to write."""

import os
from pathlib import Path

from kvframe.pages.overview import overview, renew
from kvframe.pages.policy_page import policy_page
from kvframe.registry import Registry


def files_of(
    registry: Registry, folder: Path, overview_page: Path | None = None, distribution: str | None = None
) -> dict[Path, str]:
    """Every file, and what belongs in it: a page for each policy, and the page that has the table of all.

    overview_page: a file with a place for the table; None for none.
    distribution: only policies that this distribution brings; None for all.

    Raises ConfigError where that file cannot be read or has no such place.
    """
    records = [record for record in registry.policies() if distribution in (None, record.plugin.distribution)]
    files = {folder / f"{record.name}.md": policy_page(record) for record in records}
    if overview_page is not None:
        where = Path(os.path.relpath(folder, overview_page.parent)).as_posix()
        files[overview_page] = renew(overview_page.read_text(encoding="utf-8"), overview(records, where))
    return files
