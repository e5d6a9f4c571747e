"""GPU architectures as people write them: ``sm90``, ``H100``, what nvidia-smi prints, ``hopper``.

A name stands for an architecture only where it can mean one: forwards are fenced by it.
"""

from __future__ import annotations

import re

from .names import NameProblem, nearest

# Any name of this form is valid, so that a new GPU needs no new release; `doubt` says which are not known.
GPU_ARCH_PATTERN = r"sm[0-9]{2,3}[af]?|cpu"

# By NVIDIA's list of compute capabilities (developer.nvidia.com/cuda-gpus). Each name is one word, or several
# in a row, of a name that is cut where it is neither letter nor digit.
_GPUS = {
    "sm70": ("v100", "v100s", "titan v", "volta"),
    "sm72": ("xavier",),
    "sm75": ("t4", "t4g", "t40", "quadro rtx", "titan rtx", "2070", "2080", "turing"),
    "sm80": ("a100", "a800", "a30"),
    "sm86": ("a2", "a10", "a10g", "a16", "a40", "a4000", "a4500", "a5000", "a5500", "a6000", "3080", "3090"),
    "sm87": ("orin",),
    "sm89": ("l2", "l4", "l20", "l40", "l40g", "l40s", "4060", "4070", "4080", "4090", "4090d", "ada"),
    "sm90": ("h100", "h200", "h20", "h800", "gh200", "hopper"),
    "sm100": ("b100", "b200", "gb200"),
    "sm103": ("b300", "gb300"),
    "sm110": ("thor",),
    "sm120": ("5060", "5070", "5080", "5090", "5090d", *(f"rtx pro {n}" for n in (4000, 4500, 5000, 6000))),
    "sm121": ("gb10", "dgx spark"),
}
_ARCH_OF = {name: arch for arch, names in _GPUS.items() for name in names}
# Of several architectures: no answer by themselves, and in no way of a name that has one.
_FAMILIES = {
    "ampere": "sm80 (A100, A30) or sm86 (A10, A40, RTX 30)",
    "blackwell": "sm100 (B200), sm103 (B300) or sm120 (RTX)",
}

#: Those that there are, for hints.
KNOWN_ARCHITECTURES = tuple(sorted((*_GPUS, "sm101"), key=lambda each: int(each.removeprefix("sm"))))


def architecture(word: str) -> str:
    """The architecture that `word` means, without the letter of a compilation target: ``sm90`` for ``sm90``,
    ``sm90a``, ``H100`` and ``NVIDIA H100 80GB HBM3``. Raises NameProblem where it can mean none, or several.
    """
    if re.fullmatch(GPU_ARCH_PATTERN, word):
        return canonical(word)
    found = _named(word)
    if len(found) == 1:
        return found.pop()
    if len(found) > 1:
        raise NameProblem(f"'{word}' names GPUs of {', '.join(sorted(found))}: name one architecture")
    for family, members in _FAMILIES.items():
        if family in _words(word):
            raise NameProblem(f"'{word}' is {members}: name one architecture")
    # By likeness alone h900 would be sm90, whose forwards need other fences than those of most.
    near = word.lower().startswith(("s", "c"))
    hint = nearest(word, (*KNOWN_ARCHITECTURES, "cpu")) if near else None
    written = "written sm90, sm100, ... or cpu" + ("" if near else "; or a GPU's name, such as H100")
    raise NameProblem(f"unknown GPU architecture '{word}': {written}", hint)


def canonical(word: str) -> str:
    """`architecture` of a word that has one, and any other as it is."""
    if re.fullmatch(GPU_ARCH_PATTERN, word):
        return word.rstrip("af") if word.startswith("sm") else word
    found = _named(word)
    return found.pop() if len(found) == 1 else word


def remark(word: str) -> str | None:
    """What a valid `word` is taken as, where it is no architecture itself."""
    return None if re.fullmatch(GPU_ARCH_PATTERN, word) else f"'{word}' is taken as {architecture(word)}"


def doubt(word: str) -> str | None:
    """That nobody knows the architecture of a valid `word`, where that is so.

    No likely one is named: a new GPU's number is near that of another, whose forwards need other fences.
    """
    arch = canonical(word)
    if arch == "cpu" or arch in KNOWN_ARCHITECTURES:
        return None
    known = ", ".join(KNOWN_ARCHITECTURES)
    return (
        f"no GPU of {arch} is known to this release, and no shipped rule was made for one; known are {known}"
    )


def memory_gib(word: str) -> int | None:
    """GPU memory that the name of a GPU tells, in GiB; None where it tells none, or has several."""
    if found := re.search(r"\b([0-9]{2,3}) ?GB\b", word, re.IGNORECASE):
        return int(found[1]) if "gh200" not in word.lower() else None  # that one's is of its CPU
    if _named(word) == {"sm90"} and "nvl" in _words(word):
        return 94
    sizes = {_GIB[each] for each in _words(word) if each in _GIB}
    return sizes.pop() if len(sizes) == 1 else None


# Of GPUs that are made with one size, or with sizes close to it (NVIDIA's data sheets).
_GIB = {
    **{"h100": 80, "h800": 80, "h200": 141, "b200": 180, "gb200": 186, "b300": 268, "gb300": 278},
    **{"t4": 16, "a10": 24, "a10g": 24, "a30": 24, "a40": 48, "l4": 24, "l20": 48, "l40": 48, "l40s": 48},
    **{"3090": 24, "4090": 24, "5090": 32, "gb10": 119},
}


def name_pattern() -> str:
    """A regular expression for JSON Schema, which has no flags, of texts that hold a GPU's name."""
    names = ("".join(_either_case(each) for each in name) for name in sorted(_ARCH_OF))
    return f"(^|[^A-Za-z0-9])({'|'.join(names)})([^A-Za-z0-9]|$)"


def _either_case(character: str) -> str:
    if character == " ":
        return "[^A-Za-z0-9]+"
    return f"[{character}{character.upper()}]" if character.isalpha() else character


def _named(text: str) -> set[str]:
    """The architectures of the GPUs that `text` names; the longest name at each place counts."""
    words, found, at = _words(text), set[str](), 0
    while at < len(words):
        for length in (3, 2, 1):
            if (arch := _ARCH_OF.get(" ".join(words[at : at + length]))) is not None:
                found.add(arch)
                at += length - 1
                break
        at += 1
    return found


def _words(text: str) -> list[str]:
    # RTX4090 is as usual as RTX 4090.
    words = re.split(r"[^a-z0-9]+", text.lower())
    return [part for word in words for part in re.sub(r"^(rtx)(?=[0-9a])", r"\1 ", word).split()]
