"""How many examples the kit draws: `pytest --hypothesis-profile=quick` for a first look."""

from hypothesis import settings

settings.register_profile("quick", max_examples=10, derandomize=True)
