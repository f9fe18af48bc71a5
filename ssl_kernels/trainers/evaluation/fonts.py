"""Fonts for captions in any script: matplotlib's own, those of packages that come with the trainers, the system's."""

from __future__ import annotations

import functools
import importlib.util
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_BASE = "DejaVu Sans"  # matplotlib's
_PACKAGES = ("manimgx_fonts", "noto_cjk_sans_otc")
# Scripts whose letters stand one beside the other as they are. Others are joined, stacked or set from the right.
_PLAIN = {
    "Zyyy", "Zinh", "Latn", "Grek", "Cyrl", "Armn", "Geor", "Ethi", "Hani", "Hira", "Kana", "Hang", "Bopo",
}  # fmt: skip
_JAPANESE = {"Hira", "Kana"}


class Fonts(NamedTuple):
    """In which fonts texts are drawn, and what of them cannot be."""

    families: list[str]  # the first that has a character draws it
    missing: frozenset[str] = frozenset()  # characters that no font has
    unshaped: frozenset[str] = frozenset()  # characters that this matplotlib cannot join

    def drawable(self, text: str) -> str:
        """The text with the name of the script in the place of letters that cannot be drawn."""
        shown: list[str] = []
        for character in text:
            kind = unicodedata.category(character)
            if kind in ("Cc", "Cs"):  # half a character stands for a byte of a file name that is no text
                shown.append(" " if kind == "Cc" else "\ufffd")
            elif character in self.missing | self.unshaped:
                name = f"[{script_name(character)}]"
                if not shown or shown[-1] != name:
                    shown.append(name)
            else:
                shown.append(character)
        return "".join(shown)

    def remark(self) -> str:
        """One line on what cannot be drawn and what would help; empty where all can."""
        parts = []
        for characters, help in (
            (self.missing, "no installed font has them; pip install manimgx-fonts noto-cjk-sans-otc"),
            (self.unshaped, "matplotlib 3.11 or later is needed to join such letters"),
        ):
            if characters:
                parts.append(f"{', '.join(sorted(set(map(script_name, characters))))} letters are left out ({help})")
        return "; ".join(parts)


def script_name(character: str) -> str:
    """The script that a character is of, such as Arabic; `symbol` for what all scripts use, such as emoji."""
    from fontTools import unicodedata as scripts

    script = scripts.script(character)
    return "symbol" if script in ("Zyyy", "Zinh") else scripts.script_name(script).replace("_", " ")


def fonts_for(texts: Iterable[str]) -> Fonts:
    """The fonts that draw as much of some texts as the installed ones can."""
    from fontTools import unicodedata as scripts
    from matplotlib import font_manager

    wanted = {character for text in texts for character in text if _is_visible(character)}
    families = [_BASE]
    missing = wanted - _characters(font_manager.findfont(_BASE))
    for path in _others() if missing else ():
        found = missing & _characters(path)
        if found:
            families.append(_family(path, japanese=any(scripts.script(c) in _JAPANESE for c in wanted)))
            missing -= found
        if not missing:
            break
    unshaped = {c for c in wanted - missing if scripts.script(c) not in _PLAIN} if not shapes_text() else set()
    return Fonts(families, frozenset(missing), frozenset(unshaped))


def shapes_text() -> bool:
    """Whether matplotlib joins letters, and sets them from the right, where their script wants it. 3.11 does."""
    from matplotlib import ft2font

    return hasattr(ft2font, "__libraqm_version__")


def _is_visible(character: str) -> bool:
    """Spaces, joiners and the like need no glyph."""
    is_selector = "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
    return unicodedata.category(character)[0] not in "CZ" and not is_selector


def _others() -> Iterator[str]:
    """Files of fonts besides matplotlib's own, those of the packages first."""
    import matplotlib
    from matplotlib import font_manager

    own = Path(matplotlib.get_data_path())
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            yield from sorted(str(path) for path in Path(folder).glob("*.tt[fc]") if "Italic" not in path.name)
    for entry in sorted(font_manager.fontManager.ttflist, key=lambda entry: entry.fname):
        if entry.style == "normal" and entry.weight == 400 and own not in Path(entry.fname).parents:
            yield entry.fname


@functools.lru_cache(maxsize=256)
def _characters(path: str) -> frozenset[str]:
    """What a font can draw; nothing of one that is made of pictures or cannot be read."""
    from matplotlib import ft2font

    try:
        font = ft2font.FT2Font(path)
    except (RuntimeError, OSError):
        return frozenset()
    return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()


def _family(path: str, *, japanese: bool) -> str:
    """The name under which matplotlib knows a font. Of the faces of a collection, which draw Chinese characters each as
    one country does, mainland China's is taken, or Japan's beside its own letters."""
    from matplotlib import font_manager

    def names() -> list[str]:
        return [entry.name for entry in font_manager.fontManager.ttflist if entry.fname == path]

    if not names():
        font_manager.fontManager.addfont(path)
    ending = " JP" if japanese else " SC"
    return next((name for name in names() if name.endswith(ending)), names()[0])
