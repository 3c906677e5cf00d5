"""Pages about policies, written from what they are: a page for each, and a table of all."""

from kvframe.pages.files import files_of
from kvframe.pages.overview import overview
from kvframe.pages.policy_page import policy_page

__all__ = ["files_of", "overview", "policy_page"]
