"""What people read first of an evaluation fits a terminal and says what is left out."""

from pipeline.explore.metrics_table import WORDS, cautions, headlines, metrics_text

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


def test_few_images_are_said_to_be_few():
    said = metrics_text({"images": 9, "fidelity": {"cosine": METRIC}})
    assert "note: 9 held-out images are few" in said and "select.test" in said
    assert max(map(len, said.splitlines())) <= 100
    assert "note:" not in metrics_text({"images": 50, "fidelity": {"cosine": METRIC}})


def test_a_metric_with_nothing_between_floor_and_ceiling_is_said_to_say_nothing():
    (said,) = cautions({"text_to_image": {"R@10": METRIC | {"floor": 1.0}}})
    assert "'a caption finds its own image among ten'" in said and "says nothing" in said
    assert cautions(every_metric()) == []


def test_one_label_and_classes_that_the_teacher_embeds_alike_are_named():
    group = {"accuracy": METRIC, "classes": 1}
    assert cautions({"zero_shot": group}) == [
        "all labels are one, so that every answer of zero_shot is right."
    ]
    alike = {"classes": 3, "alike": 2, "alike_classes": "'hat' and 'cap'"}
    (said,) = cautions({"zero_shot": group | alike})
    assert "embeds 2 of 3 classes like another one (cosine 1), such as 'hat' and 'cap'" in said
