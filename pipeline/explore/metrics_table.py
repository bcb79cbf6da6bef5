"""The figures of an evaluation as a table for people."""

from pipeline.core.terminal import table

GROUPS = (
    "near_training",
    "fidelity",
    "student_to_teacher",
    "text_to_image",
    "box_search",
    "pointing",
    "zero_shot",
    "segmentation",
)


def figures_table(figures: dict) -> str:
    """One line a figure: value, 95 % interval, floor, ceiling; then what is left out, and why."""
    names, rows = ("figure", "student", "95 % interval", "floor", "ceiling"), []
    for group in GROUPS:
        for name, figure in figures.get(group, {}).items():
            if isinstance(figure, dict):
                interval = f"{figure['low']:.3f} - {figure['high']:.3f}"
                ends = (f"{figure[e]:.3f}" if e in figure else "" for e in ("floor", "ceiling"))
                title = name if name.startswith(group) else f"{group} {name}"
                rows.append((title, f"{figure['value']:.3f}", interval, *ends))
                if "centre" in figure:
                    centre = f"{figure['centre']:.3f}"
                    rows.append((f"{title}, always the centre", centre, "", "", ""))
    left_out = [
        f"left out: {' '.join([group, *key.split('_')[:-2]])}, for {reason}"
        for group in GROUPS
        for key, reason in figures.get(group, {}).items()
        if key.endswith("left_out")
    ]
    return "\n".join([table(names, rows), *left_out])
