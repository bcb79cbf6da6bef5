"""The demo as README starts it: what its student is worth, and what is left at another image size."""

import json
import sys

import pytest
from support.checkout import ROOT, Checkout

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Checkout:
    checkout = Checkout(tmp_path_factory.mktemp("demo"))
    checkout.run("dvc", "repro")
    return checkout


def test_the_demos_student_is_far_above_every_floor_and_near_its_teacher(demo):
    figures = json.loads((demo.folder / "data/evaluation/metrics.json").read_text())
    assert figures["fidelity"]["cosine"]["low"] > 0.85 > 5 * figures["fidelity"]["cosine"]["floor"]
    found = figures["text_to_image"]["R@1"]
    assert found["low"] > 0.85 * found["ceiling"] > 100 * found["floor"]
    pointing = figures["pointing"]["pointing"]
    assert pointing["low"] > 0.9 > 4 * max(pointing["floor"], pointing["centre"])


def test_another_image_size_keeps_most_of_the_retrieval(demo):
    script = str(ROOT / "benchmarks/resolutions.py")
    sizes = ["--sizes", "48", "56", "64", "72", "80", "96"]
    table = demo.run(sys.executable, script, "--data", str(demo.folder / "data"), *sizes)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if " px" in line]
    kept = {int(size.split()[0]): float(share.strip("%")) / 100 for size, *_, share in rows}
    assert kept[64] == 1
    assert min(kept[56], kept[72], kept[80]) > 0.5, kept
