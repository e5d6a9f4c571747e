"""Maintainers' scripts: what a decision of this project rests on, measured. Not part of the wheel."""
