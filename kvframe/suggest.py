"""Did you mean?"""

from collections.abc import Iterable
from difflib import get_close_matches


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be; case, `-` and `_` do not count as differences."""
    by_plain = {_plain(candidate): candidate for candidate in known}
    matches = get_close_matches(_plain(name), by_plain, n=1)
    return by_plain[matches[0]] if matches else None


def hint(name: str, known: Iterable[str], label: str = "known") -> str:
    """The end of an error about an unknown name: `; did you mean 'page'? (known: mean-key, page)`."""
    names = list(known)
    match = closest(name, names)
    question = f"; did you mean {match!r}?" if match is not None else ""
    return f"{question} ({label}: {', '.join(names) or 'none'})"


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
