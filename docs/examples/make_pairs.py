"""Draw 1,500 pairs to try rayclip on: two coloured shapes, and a caption that names them, in pairs.csv and images/."""

import csv
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
SHAPES = ("circle", "square", "triangle", "bar", "ring")
NUM_PAIRS, SIDE = 1500, 64


def draw(canvas: ImageDraw.ImageDraw, shape: str, colour: str, left: int, top: int, size: int) -> None:
    """Draw one shape into a square of the canvas."""
    box = (left, top, left + size, top + size)
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "ring":
        canvas.ellipse(box, outline=colour, width=4)
    elif shape == "square":
        canvas.rectangle(box, fill=colour)
    elif shape == "bar":
        canvas.rectangle((left, top + size // 3, left + size, top + 2 * size // 3), fill=colour)
    else:
        canvas.polygon([(left + size // 2, top), (left + size, top + size), (left, top + size)], fill=colour)


generator = random.Random(0)
Path("images").mkdir(exist_ok=True)
rows = []
for number in range(NUM_PAIRS):
    image = Image.new("RGB", (SIDE, SIDE), "white")
    canvas, names = ImageDraw.Draw(image), []
    for half in range(2):
        shape, colour, size = generator.choice(SHAPES), generator.choice(COLOURS), generator.randint(18, 26)
        left = half * SIDE // 2 + generator.randint(2, SIDE // 2 - size - 2)
        draw(canvas, shape, colour, left, generator.randint(2, SIDE - size - 2), size)
        names.append(f"{colour} {shape}")
    path = f"images/{number:04}.png"
    image.save(path)
    rows.append((path, f"a {names[0]} and a {names[1]}"))

with Path("pairs.csv").open("w", newline="") as file:
    csv.writer(file).writerows([("filepath", "title"), *rows])
print(f"{NUM_PAIRS} pairs in pairs.csv")
