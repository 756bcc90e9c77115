"""Makes a folder of pictures to try `docs/your_images.md` on: 1,636 emojis in 8 classes.

    npm pack emoji-datasource-twitter@16 && tar xf emoji-datasource-twitter-16*.tgz
    python docs/emoji_folder.py package emojis

The graphics are Twitter's (X's), under CC-BY 4.0: name them where you show them.
"""

import json
import pathlib
import sys

from PIL import Image

LEFT_OUT = ("Component", "Flags")


def main(package: str, out: str) -> None:
    """Pastes each emoji of `package` on white: `out`/CLASS/NAME.png, 64 pixels a side."""
    for emoji in json.loads((pathlib.Path(package) / "emoji.json").read_text()):
        if emoji["category"] in LEFT_OUT:
            continue
        folder = pathlib.Path(out) / emoji["category"].split()[0].lower()
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.open(pathlib.Path(package) / "img/twitter/64" / emoji["image"]).convert(
            "RGBA"
        )
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        white.convert("RGB").save(folder / f"{emoji['short_name']}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
