"""The one exception that reaches a user as a single clear line, and what there is to say of foreign ones."""


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
        # What users call their fields and files may have line breaks.
        self.field, self.problem, self.remedy = (" ".join(x.splitlines()) for x in (field, problem, remedy))
        super().__init__(f"{self.field}: {self.problem}; {self.remedy}")


def first_line(error: BaseException) -> str:
    """What an exception of foreign code says, in one line; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: Python's, that of a GPU, or that of torch's CPU allocator."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)
