"""Pictures as bytes: one style, and the same bytes for the same numbers (no dates, no versions).

The only module that knows Matplotlib. Figures are built without pyplot, so any thread may draw.
"""

import base64
import io
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

COLOURS = {"student": "#2f72e0", "teacher": "#d9730d", "floor": "#8a8f98"}
DARK = {"student": "#78aaff", "teacher": "#ffa94d", "floor": "#8a8f98"}
MAP = matplotlib.colormaps["viridis"]
OPACITY = 0.65  # of a map over its image
OVER_GREY = ListedColormap((1 - OPACITY) * 0.5 + OPACITY * MAP(np.arange(256))[:, :3])
DPI = 160


@contextmanager
def style(dark: bool = False) -> Iterator[dict[str, str]]:
    """Figures made inside look alike; a dark one has light lines on no background."""
    ink = "#e6e6e6" if dark else "#20242b"
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context(
        {
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": False,
            "legend.frameon": False,
            "text.parse_math": False,  # a caption may hold dollar signs
            **dict.fromkeys(inked, ink),
        }
    ):
        yield DARK if dark else COLOURS


def png(figure: Figure, *, transparent: bool = False) -> bytes:
    """A figure's PNG."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # emoji are drawn as boxes
        figure.savefig(
            out, format="png", dpi=DPI, transparent=transparent, metadata={"Software": None}
        )
    return out.getvalue()


def picture(ax: Axes, pixels: np.ndarray, title: str = "") -> None:
    """An image without axes; a long title is broken into lines."""
    ax.imshow(pixels, interpolation="nearest")
    ax.set_title(title, fontsize=8)
    ax.axis("off")


def colour_bar(
    figure: Figure,
    axes: np.ndarray,
    low: float,
    high: float,
    label: str,
    extend: str = "neither",
) -> None:
    """The scale of `overlay`'s colours beside some axes; extend: `min` where it clips from below."""
    scale = ScalarMappable(Normalize(low, high), OVER_GREY)
    bar = figure.colorbar(scale, ax=axes, fraction=0.05, pad=0.02, aspect=25, extend=extend)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def overlay(image: np.ndarray, values: np.ndarray, low: float, high: float) -> np.ndarray:
    """(S, S, 3) uint8 and a (g, g) map -> (S, S, 3) uint8: colours from low to high over grey."""
    size = image.shape[1], image.shape[0]
    scaled = ((values - low) / max(high - low, 1e-12)).clip(0, 1)
    colours = Image.fromarray((MAP(scaled)[..., :3] * 255).round().astype(np.uint8))
    colours = colours.resize(size, Image.Resampling.NEAREST)
    grey = Image.fromarray(image).convert("L").convert("RGB")
    return np.asarray(Image.blend(grey, colours, OPACITY))


def painted(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(S, S, 3) uint8 and (S, S) labels -> (S, S, 3) uint8: a colour a label over grey, 0 bare."""
    grey = np.asarray(Image.fromarray(image).convert("L").convert("RGB"))
    colours = np.array([label_colour(label) for label in range(labels.max() + 1)])
    mixed = (1 - OPACITY) * grey + OPACITY * colours[labels]
    return np.where(labels[..., None] > 0, mixed, grey).round().astype(np.uint8)


def label_colour(label: int) -> tuple[int, ...]:
    """RGB of a label; neighbours differ in hue by the golden ratio, each seven in lightness."""
    hue = (label * 0.618034) % 1.0
    value = (1.0, 0.75, 0.55)[label // 7 % 3]
    return tuple(round(255 * float(x)) for x in hsv_to_rgb((hue, 0.85, value)))


def legend(figure: Figure, names: Sequence[str]) -> None:
    """What the colours of labels 1, 2, ... stand for, below a figure."""
    handles = [
        Rectangle((0, 0), 1, 1, color=np.array(label_colour(i)) / 255)
        for i in range(1, len(names) + 1)
    ]
    texts = [wrapped(name, 40, 1) for name in names]
    figure.legend(handles, texts, loc="outside lower center", ncols=min(3, len(names)), fontsize=8)


def gradient() -> str:
    """The colours of a map as a CSS gradient, from low to high."""
    stops = (255 * OVER_GREY(np.linspace(0, 1, 6))[:, :3]).round().astype(int).tolist()
    return f"linear-gradient(90deg, {', '.join(f'rgb({r}, {g}, {b})' for r, g, b in stops)})"


def thumbnail(pixels: np.ndarray, side: int) -> bytes:
    """(h, w, 3) uint8 -> JPEG whose longer side is at most side px."""
    image, out = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


def tile(pixels: np.ndarray, side: int | None = None) -> bytes:
    """(h, w, 3) uint8 -> PNG; side: px, enlarged with sharp edges."""
    image, out = Image.fromarray(pixels), io.BytesIO()
    if side:
        image = image.resize((side, side), Image.Resampling.NEAREST)
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def data_uri(content: bytes) -> str:
    """A JPEG or PNG as a URI that needs no file."""
    kind = "jpeg" if content[:2] == b"\xff\xd8" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def footnotes(figure: Figure, notes: Sequence[str]) -> None:
    """Notes in small print below a figure, at most three lines each."""
    width = round(18 * figure.get_figwidth())  # characters
    figure.supxlabel("\n".join(wrapped(note, width) for note in notes), fontsize=7)


def wrapped(text: str, width: int, lines: int = 3) -> str:
    """Text in at most so many lines of width characters, for a title."""
    shown = "".join(c if c.isprintable() else " " for c in text)  # fonts have no glyph for the rest
    return "\n".join(
        textwrap.wrap(shown, width, max_lines=lines, placeholder=" …", break_on_hyphens=False)
    )
