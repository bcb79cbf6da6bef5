"""The training log as CSV: a row per logged step, every column in every row."""

import csv
import io
from pathlib import Path


def write_log(path: Path, log: list[dict]) -> None:
    columns = list(dict.fromkeys(key for row in log for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(log)
    path.write_text(text.getvalue())
