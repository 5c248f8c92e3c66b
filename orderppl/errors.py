"""The one exception that reaches a user as a single clear line."""


class UserError(ValueError):
    """Bad input: names the field and says what to do about it.

    Args:
        field: the option, column, file or setting at fault.
        problem: what is wrong with it, with the offending value.
        remedy: what the user can do about it.
    """

    def __init__(self, field: str, problem: str | None = None, remedy: str = "") -> None:
        if problem is None:
            # From its text alone: so does pickle, and Pyro for an error inside a traced program, with the shapes of all
            # sites on further lines.
            field, _, rest = field.partition("\n")[0].partition(": ")
            problem, _, remedy = rest.rpartition("; ")
        self.field, self.problem, self.remedy = field, problem, remedy
        super().__init__(f"{field}: {problem}; {remedy}")
