"""Take the README's picture of a report page: `report_picture.py RUN/report.html docs/report.png`.

Shows the headline and four sections in two columns. Needs Chromium. `make picture` runs it.
"""

import io
import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH = 940  # CSS pixels, about the width of a README
MAX_BYTES = 300_000
SHOWN = ("training", "classes", "calibration", "mistakes")
STYLE = """
body { padding: .75rem 1.75rem 1rem; }
body, svg.plot { font-family: Roboto, "Noto Sans", sans-serif; }
nav, .skip, section > p, section > h3, .caption { display: none; }
.plots > div:nth-child(n + 2), section:has(#classes) .plots, section:has(#mistakes) .scroll { display: none; }
main { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2.25rem; }
h2 { margin: 1rem 0 .4rem; }
.headline { grid-template-columns: repeat(6, 1fr); gap: .6rem; margin-bottom: 0; }
.headline div { padding: .6rem .7rem; }
.headline dd { font-size: 1.25rem; }
.headline .first dd { font-size: 1.8rem; }
.headline dd .interval { font-size: .72rem; }
.plots, .scroll { margin: 0; }
.plots { grid-template-columns: 1fr; }
.matrix td, .matrix th { padding: .1rem .3rem; }
.matrix td { min-width: 2.15rem; }
section:has(#calibration) .plot { width: 76%; }
section:has(#mistakes) .gallery:nth-of-type(n + 2), .gallery li:nth-child(n + 7) { display: none; }
.gallery { grid-template-columns: repeat(3, 1fr); gap: .5rem; margin: 0; }
.gallery img { width: 5.4rem; }
"""


def take_picture(report: Path) -> Image.Image:
    """Take a screenshot with only the SHOWN sections, in light colours, at two pixels per CSS pixel."""
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    path = next(filter(None, [os.environ.get("CHROMIUM"), *found]), None)
    with sync_playwright() as api:
        browser = api.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": WIDTH, "height": 100}, device_scale_factor=2, color_scheme="light"
        )
        page.goto(report.resolve().as_uri())
        for name in SHOWN:
            page.wait_for_selector(f"section:has(#{name})", timeout=5000)
        page.add_style_tag(content=STYLE)
        kept = ", ".join(f":has(#{name})" for name in SHOWN)
        page.add_style_tag(content=f"section:not({kept}) {{ display: none; }}")
        return Image.open(io.BytesIO(page.screenshot(full_page=True)))


if __name__ == "__main__":
    target = Path(sys.argv[2])
    picture = take_picture(Path(sys.argv[1]))
    picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)
    if target.stat().st_size > MAX_BYTES:
        sys.exit(f"{target} has {target.stat().st_size:,} bytes; the limit is {MAX_BYTES:,}")
