"""A condition on a version, as the set of versions that satisfy it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache

from packaging.specifiers import InvalidSpecifier, Specifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from .fact_spec import FactValue
from .names import NameProblem


@dataclass(frozen=True)
class Versions:
    """Versions that satisfy any of some PEP 440 specifier sets; pre-releases count like any other version."""

    sets: tuple[SpecifierSet, ...]

    @classmethod
    def of(cls, entries: Iterable[str]) -> Versions:
        """Any of `entries`. Raises NameProblem for one that is not a specifier."""
        return cls(tuple(_specifiers(entry) for entry in entries))

    @cached_property
    def spans(self) -> tuple[VersionSpan, ...] | None:
        """The versions, local ones aside, as disjoint spans in ascending order.

        None for what is not decided: a specifier with an epoch, a pre-release, a local version or ``===``.
        """
        found = [_version_spans(entry) for entry in self.sets]
        decided = [spans for spans in found if spans is not None]
        if len(decided) < len(found):
            return None
        return _joined(span for spans in decided for span in spans)

    def depth(self) -> int:
        """Numbers in the longest release that is named."""
        return max(map(_depth, self.sets), default=0)

    def samples(self, depth: int) -> Iterator[str]:
        """A version of each region in which a specifier gives one answer, and a local one of each.

        Beside conditions whose releases have at most `depth` numbers, theirs and these samples together have
        one in every region in which all of them give one answer. Only where `spans` is not None.
        """
        for entry in self.sets:
            for version in _regions(entry, depth).values():
                yield from (str(version), f"{version}+0")

    def holds(self, value: FactValue) -> bool:
        if not isinstance(value, str):
            return False
        try:
            version = Version(value)
        except InvalidVersion:
            return False
        return any(entry.contains(version, prereleases=True) for entry in self.sets)

    def is_empty(self) -> bool:
        return self.spans == ()

    def within(self, other: Versions) -> bool:
        if self.spans is None or other.spans is None:
            return {str(entry) for entry in self.sets} <= {str(entry) for entry in other.sets}
        return all(
            any(
                start >= low and (high is None or (end is not None and end <= high))
                for low, high in other.spans
            )
            for start, end in self.spans
        )


def _specifiers(entry: str) -> SpecifierSet:
    try:
        found = SpecifierSet(entry)
    except InvalidSpecifier:
        hint = None
        with suppress(InvalidVersion):
            hint = f"=={Version(entry)}"  # a bare version: the operator was left out
        raise NameProblem(
            f"'{entry}' is not a version specifier (PEP 440), such as '>=0.3,<0.5'", hint
        ) from None
    if not len(found):
        raise NameProblem("an empty version specifier; leave the condition out to accept every version")
    return found


# Where a version stands among others: its release without trailing zeros, what of that release it is (a
# pre-release, the release, a post-release, or what lies between it and the next release), and for a
# post-release its number and whether it is that itself or its pre-releases.
_Place = tuple[tuple[int, ...], int, int, int]
VersionSpan = tuple[_Place, _Place | None]  # from, and up to without it; None: no upper end
_PRE, _FINAL, _POST, _BETWEEN = range(4)
_MOST_POSTS = 32  # regions grow with a post-release's number


def _boundary(part: Specifier) -> Version | None:
    """The version at which `part` changes its answer, or None for one that the regions do not handle."""
    if part.operator == "===":
        return None
    version = Version(part.version.removesuffix(".*"))
    many = (version.post or 0) > _MOST_POSTS
    return None if version.epoch or version.pre or version.is_devrelease or version.local or many else version


def _depth(entry: SpecifierSet) -> int:
    """Numbers in the longest release that a boundary of `entry` has."""
    return max((len(version.release) for version in filter(None, map(_boundary, entry))), default=0)


def _regions(entry: SpecifierSet, depth: int) -> dict[_Place, Version]:
    """Where regions of versions begin for which `entry` has one answer, local versions aside, each with a
    version in it that lies before every release of up to `depth` numbers that follows.

    A region begins at a pre-release, a release, a post-release or its pre-releases, after all of these, and
    where the prefix of ``==1.2.*`` or ``~=1.2`` ends.
    """
    found: dict[_Place, Version] = {((), _PRE, 0, 0): Version("0.dev0"), ((), _FINAL, 0, 0): Version("0")}
    for version in filter(None, map(_boundary, entry)):
        release = version.release
        dotted, at = ".".join(map(str, release)), _trimmed(release)
        found[at, _PRE, 0, 0] = Version(f"{dotted}.dev0")
        found[at, _FINAL, 0, 0] = Version(dotted)
        for post in range((version.post or 0) + 2):
            # "> the one before" accepts this .dev0 and ">= this one" does not.
            found[at, _POST, post, 0] = Version(f"{dotted}.post{post}.dev0")
            found[at, _POST, post, 1] = Version(f"{dotted}.post{post}")
        found[at, _BETWEEN, 0, 0] = Version(f"{dotted}{'.0' * (depth - len(release) + 1)}.1")
        for end in range(1, len(release) + 1):
            ended = (*release[: end - 1], release[end - 1] + 1)
            found[_trimmed(ended), _PRE, 0, 0] = Version(f"{'.'.join(map(str, ended))}.dev0")
    return found


def _trimmed(release: tuple[int, ...]) -> tuple[int, ...]:
    while release and release[-1] == 0:
        release = release[:-1]
    return release


@lru_cache(maxsize=4096)
def _version_spans(entry: SpecifierSet) -> tuple[VersionSpan, ...] | None:
    if any(_boundary(part) is None for part in entry):
        return None
    regions = sorted(_regions(entry, _depth(entry)).items(), key=lambda region: region[0])
    ends = [*(place for place, _ in regions[1:]), None]
    return _joined(
        (place, end)
        for (place, version), end in zip(regions, ends, strict=True)
        if entry.contains(version, prereleases=True)
    )


def _joined(spans: Iterable[VersionSpan]) -> tuple[VersionSpan, ...]:
    """`spans` in ascending order, joined where they touch."""
    joined: list[VersionSpan] = []
    for start, end in sorted(spans, key=lambda span: span[0]):
        if joined and (joined[-1][1] is None or start <= joined[-1][1]):
            before = joined[-1][1]
            joined[-1] = (joined[-1][0], None if before is None or end is None else max(before, end))
        else:
            joined.append((start, end))
    return tuple(joined)
