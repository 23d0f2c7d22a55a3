"""How a command says that it cannot go on."""

__all__ = ["CommandError"]


class CommandError(Exception):
    """One line for the person at the terminal, and the exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code
