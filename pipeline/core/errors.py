"""The one exception that reaches a user: what was found, what was expected, what to run next."""


class PipelineError(Exception):
    """A condition that the user can mend. The command line prints it and exits with status 1.

    The message says what was found, what was expected, and what to run or change next.
    """
