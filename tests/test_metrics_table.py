"""What people read first of an evaluation fits a terminal and says what is left out."""

from pipeline.explore.metrics_table import WORDS, headlines, metrics_text

METRIC = {"value": 0.5, "low": 0.4, "high": 0.6, "floor": 0.1, "ceiling": 1.0}


def every_metric() -> dict:
    found: dict = {}
    for group, name in WORDS:
        found.setdefault(group, {})[name] = METRIC
    return found


def test_the_table_fits_a_terminal_of_100_columns():
    lines = metrics_text(every_metric()).splitlines()
    assert len(lines) == len(WORDS) + 2
    assert max(map(len, lines)) <= 100
    assert not any("…" in line for line in lines)


def test_what_was_not_measured_is_no_row_and_what_has_no_floor_is_empty():
    metric = {key: value for key, value in METRIC.items() if key != "floor"}
    (row,) = headlines({"fidelity": {"cosine": metric, "images": 7}})
    assert row.value == "0.500" and row.floor == "" and row.ceiling == "1.000"
    text = metrics_text({"segmentation": {"left_out": "no masks"}, "zero_shot": {}})
    assert text.splitlines()[-1] == "left out: segmentation, for no masks"
