"""Scripts of the maintainers, run from a clone and left out of the wheel: how figures and tables are made."""
