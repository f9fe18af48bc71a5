"""Tables of pairs as people have them, and what a reader has to make of each.

A case takes the rows of a good table, paths and captions, and its folder. It returns the bytes of the file and the
pairs that are in it: rows of a path and the captions of the image, in order.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from conftest import drawing, rows

from ssl_kernels.trainers.data.files import ABSENT, BROKEN, NO_CAPTION, NO_IMAGE
from ssl_kernels.trainers.data.tables import NUL, STRAY_MARK

Pairs = list[tuple[str, str]]
Case = Callable[[Pairs, Path], tuple[bytes, list[tuple[str, ...]]]]
COUNT = 40


def write_images(folder: Path) -> Pairs:
    """The drawings that all tables name, and the rows of a good table."""
    (folder / "base").mkdir(parents=True)
    pairs = []
    for i, (colour, shape, shade) in enumerate(rows(COUNT)):
        drawing(colour, shape, shade).save(folder / "base" / f"{i:03}.png")
        pairs.append((f"base/{i:03}.png", f"a {colour} {shape} number {i}"))
    return pairs


def delimited(
    pairs: Sequence[Sequence[str]], separator: str = ",", end: str = "\n", head: Sequence[str] = ("image", "caption")
) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=separator, lineterminator=end).writerows([head, *pairs])
    return out.getvalue()


def json_lines(records: Sequence[object], end: str = "\n", **options: bool) -> str:
    return end.join(json.dumps(record, **options) for record in records)  # type: ignore[arg-type]


def objects(pairs: Sequence[tuple[str, object]]) -> list[dict[str, object]]:
    return [{"image": image, "caption": caption} for image, caption in pairs]


def text(write: Callable[[Pairs], str], encoding: str = "utf-8") -> Case:
    """A table of the good rows, written in another way."""
    return lambda pairs, folder: (write(pairs).encode(encoding), list(pairs))


def with_captions(change: Callable[[int, str], str], write: Callable[[Pairs], str], encoding: str = "utf-8") -> Case:
    """A table of other captions, which a reader has to find as they are but for space around them."""

    def make(pairs: Pairs, folder: Path) -> tuple[bytes, list[tuple[str, ...]]]:
        changed = [(image, change(i, caption)) for i, (image, caption) in enumerate(pairs)]
        return write(changed).encode(encoding), [(image, caption.strip()) for image, caption in changed]

    return make


def with_paths(change: Callable[[str, Path], str]) -> Case:
    """A table that spells the paths in another way."""
    return lambda pairs, folder: (
        delimited([(change(image, folder), caption) for image, caption in pairs]).encode(), list(pairs)
    )  # fmt: skip


def lists(pairs: Pairs, folder: Path) -> tuple[bytes, list[tuple[str, ...]]]:
    several = [(image, [caption, f"{caption} again", " ", caption]) for image, caption in pairs]
    return json_lines(objects(several)).encode(), [(image, caption, f"{caption} again") for image, caption in pairs]


def lists_in_cells(pairs: Pairs, folder: Path) -> tuple[bytes, list[tuple[str, ...]]]:
    frame = pd.DataFrame([(image, [caption, "it's so"]) for image, caption in pairs], columns=["image", "captions"])
    return frame.to_csv(index=False).encode(), [(image, caption, "it's so") for image, caption in pairs]


def parquet(several: bool = False) -> Case:
    def make(pairs: Pairs, folder: Path) -> tuple[bytes, list[tuple[str, ...]]]:
        out = io.BytesIO()
        frame = pd.DataFrame(pairs, columns=["image_path", "TEXT"])
        frame.insert(0, "width", 24)
        if several:
            frame["TEXT"] = [[caption, "a drawing"] for caption in frame["TEXT"]]
        frame.to_parquet(out)
        return out.getvalue(), [(*pair, "a drawing") if several else pair for pair in pairs]

    return make


def pandas_tsv(pairs: Pairs, folder: Path) -> tuple[bytes, list[tuple[str, ...]]]:
    frame = pd.DataFrame([(image, f'say "{caption}", twice') for image, caption in pairs], columns=["image", "caption"])
    return frame.to_csv(index=False, sep="\t").encode(), [tuple(pair) for pair in frame.to_numpy().tolist()]


def plain(pairs: Pairs, separator: str = ",", head: str = "image,caption\n", end: str = "\n") -> str:
    """Cells that are not quoted, whatever is in them."""
    return head + end.join(f"{image}{separator}{caption}" for image, caption in pairs)


GOOD: dict[str, Case] = {
    # Separators and endings.
    "open_clip.csv": text(lambda pairs: delimited(pairs, "\t", head=("filepath", "title"))),
    "comma.tsv": text(lambda pairs: delimited(pairs, head=("filepath", "title"))),
    "tab.csv": text(lambda pairs: delimited(pairs, "\t")),
    "semicolon.csv": text(lambda pairs: delimited(pairs, ";")),
    "bar.csv": text(lambda pairs: plain(pairs, "| ", "image_name| comment\n")),
    "upper.CSV": text(delimited),
    "comma.txt": text(delimited),
    "no_ending": text(delimited),
    "commas in captions.csv": with_captions(lambda i, c: f"{c}; with, commas", lambda p: delimited(p, "\t")),
    # Headers.
    "spaces.csv": text(lambda pairs: plain(pairs, ", ", "image, caption\n")),
    "case.csv": text(lambda pairs: plain(pairs, ",", "Image,Caption\n")),
    "words.csv": text(lambda pairs: delimited(pairs, head=("File Path", "Alt-Text"))),
    "others.csv": lambda pairs, folder: (
        delimited([("9", caption, "http://x/y", image) for image, caption in pairs],
                  head=("id", "caption", "url", "image")).encode(), list(pairs),
    ),
    "index.csv": text(lambda pairs: pd.DataFrame(pairs, columns=["image", "caption"]).to_csv()),
    "commas in the header.csv": text(
        lambda pairs: delimited([(*pair, "x") for pair in pairs], ";", head=("image", "title", "a, b, and c"))
    ),
    "no header.csv": text(lambda pairs: plain(pairs, ",", "")),
    "no header, turned.csv": lambda pairs, folder: (
        "\n".join(f"{caption}\t{image}" for image, caption in pairs).encode(), list(pairs)
    ),
    "blank lines.csv": text(lambda pairs: plain(pairs, ",", "\n\nimage,caption\n\n", "\n\n") + "\n\n"),
    "empty cells at the end.csv": text(lambda pairs: plain(pairs, ",", "image,caption\n", ",,\n") + ",,\n"),
    # Encodings and ends of lines.
    "crlf.csv": text(lambda pairs: delimited(pairs, end="\r\n")),
    "cr.csv": text(lambda pairs: delimited(pairs, end="\r")),
    "bom.csv": text(lambda pairs: delimited(pairs, end="\r\n"), "utf-8-sig"),
    "utf16.csv": text(delimited, "utf-16"),
    "utf16be.tsv": text(lambda pairs: "\ufeff" + delimited(pairs, "\t"), "utf-16-be"),
    "utf16 without a mark.csv": with_captions(lambda i, c: f"{c} é", delimited, "utf-16-le"),
    "utf32.csv": text(delimited, "utf-32"),
    "other scripts.csv": with_captions(lambda i, c: f"赤い丸 {i} Привет مرحبا 🎈 हिन्दी", delimited),
    # Quotes, line breaks and length.
    "quotes.csv": with_captions(lambda i, c: f'say "{c}", she said', delimited),
    "quoted.csv": text(lambda pairs: "\n".join(f'"{a}","{b}"' for a, b in [("image", "caption"), *pairs])),
    "pandas.tsv": pandas_tsv,
    "letters.tsv": with_captions(
        lambda i, c: f'"{c}' if i % 3 else f'"{c}" or "none"', lambda p: plain(p, "\t", "image\tcaption\n")
    ),
    "line breaks.csv": with_captions(lambda i, c: f"{c}\nsecond line\r\nthird, line", delimited),
    "line breaks.tsv": with_captions(lambda i, c: f"{c}\nsecond line", lambda p: delimited(p, "\t")),
    "long.csv": with_captions(lambda i, c: c if i else "x " * 100_000, delimited),
    # JSON and Parquet.
    "lines.jsonl": text(lambda pairs: json_lines(objects(pairs)) + "\n\n"),
    "lines, crlf.jsonl": text(lambda pairs: json_lines(objects(pairs), "\r\n"), "utf-8-sig"),
    "u2028.jsonl": with_captions(lambda i, c: f"{c}\u2028x", lambda p: json_lines(objects(p), ensure_ascii=False)),
    "lists.jsonl": lists,
    "lists in cells.csv": lists_in_cells,
    "numbers.jsonl": lambda pairs, folder: (
        json_lines(objects([(image, i) for i, (image, _) in enumerate(pairs)])).encode(),
        [(image, str(i)) for i, (image, _) in enumerate(pairs)],
    ),
    "list.json": text(lambda pairs: json.dumps(objects(pairs))),
    "indented.json": text(lambda pairs: json.dumps(objects(pairs), indent=2)),
    "keys in any order.jsonl": text(
        lambda pairs: json_lines([dict(sorted(o.items(), reverse=i % 2 > 0)) for i, o in enumerate(objects(pairs))])
    ),
    "table.parquet": parquet(),
    "lists.parquet": parquet(several=True),
    "parquet, by another name": parquet(),
    "gzipped.csv.gz": lambda pairs, folder: (gzip.compress(delimited(pairs).encode()), list(pairs)),
    "gzipped.jsonl.gz": lambda pairs, folder: (gzip.compress(json_lines(objects(pairs)).encode()), list(pairs)),
    # Paths.
    "absolute.csv": with_paths(lambda image, folder: str(folder / image)),
    "home.csv": with_paths(lambda image, folder: f"~/{image}"),
    "backslashes.csv": with_paths(lambda image, folder: image.replace("/", "\\")),
    "file urls.csv": with_paths(lambda image, folder: (folder / image).as_uri()),
    "dots.csv": with_paths(lambda image, folder: f" ./base/../{image} "),
}  # fmt: skip


def row(number: int, change: Callable[[str, str], str]) -> Callable[[Pairs], str]:
    """A table of unquoted cells of which one row is written in another way."""
    return lambda pairs: (
        "image,caption\n" + "\n".join(change(*pair) if i == number else ",".join(pair) for i, pair in enumerate(pairs))
    )


# Tables with rows that cannot be used: what is in the file, which rows these are, their reason, and how it is told.
LEFT_OUT: dict[str, tuple[Callable[[Pairs], str], list[int], str, str]] = {
    "empty.csv": (row(7, lambda image, caption: f"{image},"), [7], NO_CAPTION, "empty.csv:9"),
    "space.csv": (row(7, lambda image, caption: f"{image},  "), [7], NO_CAPTION, "space.csv:9"),
    "nan.csv": (row(7, lambda image, caption: f"{image},nan"), [7], NO_CAPTION, "nan.csv:9"),
    "null.jsonl": (
        lambda pairs: json_lines(objects([(a, None if i == 7 else b) for i, (a, b) in enumerate(pairs)])),
        [7], NO_CAPTION, "null.jsonl:8",
    ),
    "nan.jsonl": (
        lambda pairs: json_lines(objects([(a, float("nan") if i == 7 else b) for i, (a, b) in enumerate(pairs)])),
        [7], NO_CAPTION, "nan.jsonl:8",
    ),
    "empty list.jsonl": (
        lambda pairs: json_lines(objects([(a, [None, ""] if i == 7 else b) for i, (a, b) in enumerate(pairs)])),
        [7], NO_CAPTION, "empty list.jsonl:8",
    ),
    "no image.csv": (row(3, lambda image, caption: f",{caption}"), [3], NO_IMAGE, "no image.csv:5"),
    "missing.csv": (
        row(20, lambda image, caption: f"base/nope.png,{caption}"), [20], ABSENT, "missing.csv:22 (",
    ),
    "folder.csv": (row(20, lambda image, caption: f"base,{caption}"), [20], ABSENT, "folder.csv:22 ("),
    "nul in a path.csv": (
        row(20, lambda image, caption: f"ba\0se/x,{caption}"), [20], ABSENT, "nul in a path.csv:22",
    ),
    "short.csv": (
        row(5, lambda image, caption: image), [5], BROKEN,
        "short.csv:7 (it has 1 cells, and the header 2)",
    ),
    "extra.csv": (
        row(5, lambda image, caption: f"{image},{caption}, and more"), [5], BROKEN,
        "extra.csv:7 (it has 3 cells, and the header 2)",
    ),
    "unclosed, with a comma.csv": (
        row(5, lambda image, caption: f'{image},"{caption}, and more'), [5], BROKEN,
        "unclosed, with a comma.csv:7 (it has 3 cells",
    ),
    "cut.jsonl": (
        lambda pairs: json_lines(objects(pairs))[:-9], [COUNT - 1], BROKEN,
        f"cut.jsonl:{COUNT} (it is not JSON (Unterminated string",
    ),
    "list among objects.jsonl": (
        lambda pairs: json_lines([list(pairs[i]) if i == 4 else each for i, each in enumerate(objects(pairs))]),
        [4], BROKEN, 'jsonl:5 (expected a JSON object, got ["base/004.png"',
    ),
}  # fmt: skip

# Tables of which a row is used, but not as it stands: how, the row's caption, and where.
ODD: dict[str, tuple[Callable[[Pairs], str], str, str, str]] = {
    "unclosed.csv": (
        row(5, lambda image, caption: f'{image},"{caption}'), STRAY_MARK,
        '"a {}', "unclosed.csv:7",
    ),
    "unclosed, all quoted.csv": (
        lambda pairs: "\n".join(
            f'"{a}","{b}' + ('"' if i != 6 else "") for i, (a, b) in enumerate([("image", "caption"), *pairs])
        ),
        STRAY_MARK, '"a {}', "unclosed, all quoted.csv:7",
    ),
    "closed by another row.csv": (
        lambda pairs: row(5, lambda image, caption: f'{image},"{caption}')(
            [(a, f'{b} 5"' if i == 30 else b) for i, (a, b) in enumerate(pairs)]
        ),
        STRAY_MARK, '"a {}', "closed by another row.csv:7",
    ),
    "nul.csv": (
        row(5, lambda image, caption: f"{image},{caption}\0"), NUL, "a {}",
        "nul.csv:7",
    ),
}  # fmt: skip

# Tables that cannot be read at all, and what the one line has to say.
REFUSED: dict[str, tuple[Callable[[Pairs], bytes], str]] = {
    "nothing.csv": (lambda pairs: b"", "nothing.csv holds no pairs"),
    "header.csv": (lambda pairs: b"image,caption\n", "header.csv holds no pairs"),
    "latin1.csv": (
        lambda pairs: delimited([(a, f"{b} café") for a, b in pairs]).encode("latin-1"),
        "line 2 is not UTF-8 (it has the byte 0xe9); --encoding names another encoding, such as latin-1",
    ),
    "late.csv": (
        lambda pairs: delimited(pairs * 30).encode() + b"base/000.png,caf\xe9\n", f"line {30 * COUNT + 2} is not UTF-8",
    ),
    "urls.csv": (
        lambda pairs: delimited([(f"https://example.com/{a}", b) for a, b in pairs]).encode(),
        "urls.csv:2: expected the path of an image, got the URL 'https://example.com/base/000.png'",
    ),
    "unknown columns.csv": (
        lambda pairs: delimited(pairs, head=("picture", "words")).encode(),
        "has no column of captions, such as 'caption', 'captions', 'title', 'text'; it has 'picture', 'words'",
    ),
    "no header, three cells.csv": (
        lambda pairs: "\n".join(f"{i},{a},{b}" for i, (a, b) in enumerate(pairs)).encode(),
        "has no column of images, such as 'image', 'images', 'filepath', 'file_name'; it has '0', 'base/000.png', 'a ",
    ),
    "all too long.csv": (
        lambda pairs: ("image,caption\n" + "\n".join(f"{a},{b}, and more" for a, b in pairs)).encode(),
        "broken: ",
    ),
    "workbook.csv": (lambda pairs: b"PK\x03\x04....", "is an Excel workbook or a zip archive; save the table as CSV"),
    "cut.csv.gz": (lambda pairs: gzip.compress(delimited(pairs).encode())[:-20], "cannot read"),
    "columns.json": (
        lambda pairs: pd.DataFrame(pairs, columns=["image", "caption"]).to_json().encode(),
        "columns.json:1: expected a path in the column 'image', got {'0': 'base/000.png'",
    ),
    "not json.jsonl": (lambda pairs: b"{'image': 'x'}\n", "line 1: it is not JSON"),
    "numbers.json": (lambda pairs: b"[1, 2]", "row 1: expected a JSON object, got 1"),
    "images in it.jsonl": (
        lambda pairs: json_lines([{"image": {"bytes": "x", "path": None}, "text": "a"}]).encode(),
        "images in it.jsonl:1: expected a path in the column 'image', got {'bytes': 'x'",
    ),
    "cut.parquet": (lambda pairs: b"PAR1" + b"\0" * 50, "cannot read"),
}  # fmt: skip
