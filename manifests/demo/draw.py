"""params.yaml -> world/: a few thousand captioned scenes whose boxes are known exactly.

Run:   python draw.py            (dvc runs it as stage `world`)
Makes: world/images/NNNNN.jpg    one to three plain shapes anywhere on a textured grey background
       world/masks/NNNNN.png     which pixel shows which object: 0 is background, 1 to 36 TEXTS
       world/scenes.parquet      one row per scene: url, caption, label, boxes, mask
Cost:  about 6 s.

A caption lists the scene's objects ("a small red circle and a large blue ring") and no two scenes
have the same list, whatever its order, so a caption names exactly one scene. No object hides
another and no scene holds two objects of one colour and shape, so a box's text ("a red circle")
is unambiguous.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

HERE = Path(__file__).parent

COLOURS = {
    "red": (215, 30, 35),
    "green": (30, 160, 50),
    "blue": (35, 65, 215),
    "yellow": (240, 220, 35),
    "purple": (145, 40, 175),
    "cyan": (40, 210, 220),
}
# Inside or outside, for u (right) and v (down) in [-1, 1]. Each shape touches all four sides.
SHAPES = {
    "circle": lambda u, v: u**2 + v**2 <= 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 1,
    "triangle": lambda u, v: abs(u) <= (1 + v) / 2,
    "diamond": lambda u, v: abs(u) + abs(v) <= 1,
    "ring": lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.3),
    "cross": lambda u, v: np.minimum(abs(u), abs(v)) <= 0.33,
}
SIZES = {"small": (0.27, 0.34), "large": (0.42, 0.52)}  # side of the box / side of the scene
OBJECT_COUNTS = {1: 0.02, 2: 0.4, 3: 0.58}  # objects in a scene: how often
COLOUR_JITTER, NOISE = 18, 5  # of 255
TEXTS = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]  # the classes, from 1
SUBSAMPLES = 4  # per pixel and axis, for smooth edges

SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        ("label", pa.string()),
        (
            "boxes",
            pa.list_(
                pa.struct(
                    [("text", pa.string())]
                    + [(side, pa.float32()) for side in ("x0", "y0", "x1", "y1")]
                )
            ),
        ),
        ("mask", pa.string()),
    ]
)


@dataclass(frozen=True)
class Thing:
    """One object; its box is x <= column < x + side, y <= row < y + side, in px."""

    size: str
    colour: str
    shape: str
    x: int
    y: int
    side: int

    @property
    def text(self) -> str:
        return f"a {self.colour} {self.shape}"

    @property
    def description(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"

    def touches(self, other: "Thing") -> bool:
        """True where the boxes overlap or share an edge."""
        return (
            abs(2 * (self.x - other.x) + self.side - other.side) <= self.side + other.side
            and abs(2 * (self.y - other.y) + self.side - other.side) <= self.side + other.side
        )


def caption(things: list[Thing]) -> str:
    """`a small red circle, a large blue ring and a large cyan cross`."""
    *first, last = [thing.description for thing in things]
    return f"{', '.join(first)} and {last}" if first else last


def pick(rng: np.random.Generator, names: dict[str, object]) -> str:
    return list(names)[rng.integers(len(names))]


def place_things(rng: np.random.Generator, size: int) -> list[Thing]:
    """One to three objects that do not touch and differ in colour or shape, in random order."""
    count = rng.choice(list(OBJECT_COUNTS), p=list(OBJECT_COUNTS.values()))
    things: list[Thing] = []
    while len(things) < count:
        kind, colour, shape = (pick(rng, names) for names in (SIZES, COLOURS, SHAPES))
        low, high = SIZES[kind]
        side = int(rng.integers(round(low * size), round(high * size) + 1))
        x, y = rng.integers(0, size - side + 1, 2).tolist()
        thing = Thing(kind, colour, shape, x, y, side)
        if any(thing.touches(other) or thing.text == other.text for other in things):
            things = []  # start again: two large objects may leave no room for a third
        else:
            things.append(thing)
    return things


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Stripes, checks, waves or clouds between two nearly grey tones: (size, size, 3) float."""
    row, column = np.mgrid[:size, :size]
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.06, 0.3) * size
    along = np.sin(2 * np.pi * (column * np.cos(angle) + row * np.sin(angle)) / period)
    across = np.sin(2 * np.pi * (row * np.cos(angle) - column * np.sin(angle)) / period)
    clouds = Image.fromarray(rng.random((5, 5), dtype=np.float32)).resize((size, size))
    patterns = [along > 0, along * across > 0, (1 + along) / 2, np.asarray(clouds)]
    mix = patterns[rng.integers(len(patterns))][..., None]
    dark, light = rng.uniform(85, 170, (2, 1)) + rng.uniform(-12, 12, (2, 3))
    return dark + mix * (light - dark) + rng.normal(0, NOISE, (size, size, 3))


@cache
def coverage(shape: str, side: int) -> np.ndarray:
    """How much of each pixel of its box a shape covers: (side, side, 1) in [0, 1]."""
    ticks = (np.arange(side * SUBSAMPLES) + 0.5) / (side * SUBSAMPLES) * 2 - 1
    inside = SHAPES[shape](ticks[None, :], ticks[:, None])
    return inside.reshape(side, SUBSAMPLES, side, SUBSAMPLES).mean((1, 3))[..., None]


def paint(canvas: np.ndarray, things: list[Thing], rng: np.random.Generator) -> np.ndarray:
    """A copy of the canvas (S, S, 3) with the objects on it, rounded to uint8."""
    canvas = canvas.copy()
    for thing in things:
        box = canvas[thing.y : thing.y + thing.side, thing.x : thing.x + thing.side]
        colour = COLOURS[thing.colour] + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3)
        box += coverage(thing.shape, thing.side) * (colour - box)
    return canvas.clip(0, 255).round().astype(np.uint8)


def mask_of(things: list[Thing], size: int) -> np.ndarray:
    """(size, size) uint8: an object's class where it covers at least half of a pixel, else 0."""
    mask = np.zeros((size, size), np.uint8)
    for thing in things:
        covered = coverage(thing.shape, thing.side)[..., 0] >= 0.5
        box = mask[thing.y : thing.y + thing.side, thing.x : thing.x + thing.side]
        box[covered] = TEXTS.index(thing.text) + 1
    return mask


def scenes(seed: int, count: int, size: int) -> Iterator[tuple[np.ndarray, list[Thing]]]:
    """`count` pictures (size, size, 3) uint8 with their objects; no two hold the same objects."""
    rng = np.random.default_rng(seed)
    seen = set()
    while len(seen) < count:
        things = place_things(rng, size)
        contents = frozenset(thing.description for thing in things)
        if contents not in seen:
            seen.add(contents)
            yield paint(background(rng, size), things, rng), things


def row_of(name: str, things: list[Thing]) -> dict:
    """One row of the manifest; the label is the shape of the largest object."""
    sides = [
        {"text": t.text, "x0": t.x, "y0": t.y, "x1": t.x + t.side, "y1": t.y + t.side}
        for t in things
    ]
    label = max(things, key=lambda thing: thing.side).shape
    files = {"url": f"file:images/{name}.jpg", "mask": f"file:masks/{name}.png"}
    return files | {"caption": caption(things), "label": label, "boxes": sides}


def draw_world(folder: Path, seed: int, count: int, size: int) -> None:
    """Write images, masks and scenes.parquet into folder: same arguments, same bytes."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (pixels, things) in enumerate(scenes(seed, count, size), start=1):
        name = f"{number:05}"
        # Full-resolution colour: the usual halving would smear a small shape's colour.
        Image.fromarray(pixels).save(folder / f"images/{name}.jpg", quality=92, subsampling=0)
        Image.fromarray(mask_of(things, size)).save(folder / f"masks/{name}.png")
        rows.append(row_of(name, things))
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "scenes.parquet")


if __name__ == "__main__":
    world = yaml.safe_load((HERE / "params.yaml").read_text())["world"]
    draw_world(HERE / "world", world["seed"], world["scenes"], world["size"])
    print(f"world: {world['scenes']} scenes in {HERE / 'world'}")
