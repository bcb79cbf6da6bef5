"""A folder of 240 photos as one shard: `pipeline download` beside img2dataset and bare decode-and-encode.

Run:  python benchmarks/one_folder.py FOLDER [--photos 240] [--rounds 3]

img2dataset fetches the same files by `file:` address into Parquet, at the same size and quality and
with the same number of processes; the bare loop decodes, resizes and encodes them with Pillow in one
process. All of them read what the operating system has in memory. By turns.
"""

import argparse
import csv
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from by_turns import median_ratio, seconds_by_turns
from PIL import Image

from pipeline.core.config import load_section
from pipeline.core.presets import write_preset
from pipeline.fetch.folder import write_folder_manifest

SIDE, QUALITY = 256, 95  # of the preset


def ours(photos: Path, number: int, scratch: Path) -> None:
    """The whole command, from the manifest to data/images in one shard."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    write_preset("clip-vit-b32", folder / "params.yaml", force=True)
    text = (folder / "params.yaml").read_text()
    config = load_section(folder / "params.yaml", "download")
    text = text.replace(f"manifest: {config.manifest}", f"manifest: {folder / 'photos.csv'}")
    text = text.replace(f"root: {config.root}", f"root: {photos}")
    (folder / "params.yaml").write_text(text)
    assert len(write_folder_manifest(photos, folder / "photos.csv", None, force=True)) == number
    command = ["download", "--params", folder / "params.yaml", "--data", folder / "data"]
    subprocess.run([sys.executable, "-m", "pipeline.cli", *command], check=True)
    assert len(list((folder / "data/images").glob("*.parquet"))) == 1


def plain(photos: Path, number: int, scratch: Path) -> None:
    """img2dataset's own command line on the same files."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    with (folder / "urls.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["url"], *([path.as_uri()] for path in sorted(photos.iterdir()))])
    options = {
        "url_list": folder / "urls.csv", "input_format": "csv", "output_format": "parquet",
        "output_folder": folder / "out", "image_size": SIDE, "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True, "encode_quality": QUALITY, "processes_count": 2,
        "thread_count": 32, "number_sample_per_shard": number, "enable_wandb": False,
    }  # fmt: skip
    command = [f"--{name}={value}" for name, value in options.items()]
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}
    subprocess.run(
        [Path(sys.executable).parent / "img2dataset", *command],
        check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert len(list((folder / "out").glob("*.parquet"))) == 1


def bare(photos: Path, *_: object) -> None:
    for path in photos.iterdir():
        image = Image.open(path).convert("RGB")
        scale = min(1.0, SIDE / min(image.size))
        size = [round(side * scale) for side in image.size]
        image.resize(size, Image.Resampling.LANCZOS).save(io.BytesIO(), "JPEG", quality=QUALITY)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(scratch, "photos")
        photos.mkdir()
        for path in sorted(arguments.folder.rglob("*.jpg"))[: arguments.photos]:
            (photos / path.name).write_bytes(path.read_bytes())
        job = photos, arguments.photos, Path(scratch)
        calls = {f.__name__: lambda f=f: f(*job) for f in (ours, plain, bare)}
        taken = seconds_by_turns(calls, arguments.rounds, warm_up=True)
    for name, seconds in taken.items():
        print(f"{name}: {', '.join(f'{s:.1f}' for s in seconds)} s")
    for name in ("plain", "bare"):
        print(f"ours / {name}: {median_ratio(taken['ours'], taken[name]):.2f}")


if __name__ == "__main__":
    main()
