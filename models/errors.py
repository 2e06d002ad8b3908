"""The root of all errors that a person is meant to read; here, because every package may import models."""


class HeadraceError(Exception):
    """An error whose text is one sentence with its remedy; the command line prints it and nothing else.

    Subclasses put the sentence together in their constructor, so that one kind of trouble reads the same
    wherever it is raised. Anything else that reaches the command line is a bug and keeps its traceback.
    """

    exit_code = 1
