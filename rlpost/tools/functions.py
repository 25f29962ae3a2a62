"""Tools that a recipe can name under `tools`.

A tool's parameters are the model's to give, but for keyword-only ones, which are the recipe's `args`. What it says of
itself, name, types and the lines below `Args:`, is what the model reads.
"""

from rlpost.tools.calculator import calculator
from rlpost.tools.python import python
from rlpost.tools.search import search

__all__ = ["calculator", "python", "search"]
