"""The figures of an evaluation as a table for people."""


def figures_table(figures: dict) -> str:
    """One line a figure: value, 95 % interval, floor, ceiling."""
    rows = [("figure", "student", "95 % interval", "floor", "ceiling")]
    for group in ("fidelity", "student_to_teacher", "text_to_image", "pointing", "zero_shot"):
        for name, figure in figures.get(group, {}).items():
            if isinstance(figure, dict):
                interval = f"{figure['low']:.3f} - {figure['high']:.3f}"
                ends = f"{figure['floor']:.3f}", f"{figure['ceiling']:.3f}"
                title = name if name.startswith(group) else f"{group} {name}"
                rows.append((title, f"{figure['value']:.3f}", interval, *ends))
                if "centre" in figure:
                    centre = f"{figure['centre']:.3f}"
                    rows.append((f"{title}, always the centre", centre, "", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
