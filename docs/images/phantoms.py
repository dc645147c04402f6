"""Draws `phantoms.png`, the picture of docs/phantom.md.

python docs/images/phantoms.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from medsae.data.phantom import Anatomy, Capture, Findings, Phantom, render

BODY = Anatomy(seed=3)
PLAIN = Capture(seed=5)
PORTABLE = Capture(seed=5, projection="AP")
SHOWN = {
    "normal, PA": Phantom(BODY, Findings(), PLAIN),
    "woman, rotated": Phantom(Anatomy(seed=8, sex="Female", breast=2.5, width=0.95), Findings(), Capture(seed=5, rotation=6)),
    "AP, obese": Phantom(Anatomy(seed=9, habitus=0.9, heart=1.1), Findings(), PORTABLE),
    "lateral": Phantom(BODY, Findings(), Capture(seed=5, view="lateral", projection="")),
    "cardiomegaly": Phantom(BODY, Findings(cardiomegaly=0.9), PLAIN),
    "effusions": Phantom(BODY, Findings(effusion_right=0.7, effusion_left=0.3), PLAIN),
    "pneumothorax": Phantom(BODY, Findings(pneumothorax_right=0.6), PLAIN),
    "consolidation": Phantom(BODY, Findings(consolidation_left=0.9), PLAIN),
    "edema": Phantom(BODY, Findings(edema=0.8), PLAIN),
    "atelectasis left, nodule right": Phantom(BODY, Findings(atelectasis_left=0.8, nodule_right=0.7), PLAIN),
    "rib fractures left": Phantom(BODY, Findings(fracture_left=0.8), PLAIN),
    "devices": Phantom(BODY, Findings(central_line=1, endotracheal_tube=1, ecg_leads=1, pacemaker=1), PORTABLE),
}
TILE, COLUMNS = (285, 234), 4


def main() -> None:
    font = ImageFont.load_default(15)
    sheet = Image.new("L", (TILE[0] * COLUMNS, TILE[1] * -(-len(SHOWN) // COLUMNS)))
    for i, (text, phantom) in enumerate(SHOWN.items()):
        x, y = i % COLUMNS * TILE[0], i // COLUMNS * TILE[1]
        drawn = Image.fromarray(render(phantom))
        drawn.thumbnail((TILE[0], 10 * TILE[1]))
        sheet.paste(drawn.crop((0, 0, drawn.width, TILE[1])), (x + (TILE[0] - drawn.width) // 2, y))
        ImageDraw.Draw(sheet).text((x + 8, y + TILE[1] - 24), text, 255, font, stroke_width=2, stroke_fill=0)
    sheet.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
