"""Offline CLIP distillation: `from pipeline import Student`."""


def __getattr__(name: str) -> object:
    """Import the student, and torch with it, only when it is asked for."""
    if name == "Student":
        from pipeline.models.student import Student

        return Student
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
