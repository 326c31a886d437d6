"""What can go wrong, and the exit code that it becomes.

    OptimizeError             (exit 1)  a step could not be done
    |- RecipeError            (exit 2)  the recipe does not say what can be understood
    |- Refused                (exit 2)  the recipe is clear, and this cannot be done; said before any work
    |- OutOfMemory            (exit 1)  a step used more memory than it was given
    |- Stopped                (exit 4)  SIGTERM came; what is done is kept
    |- GateFailed             (exit 3)  everything was done, and the result is not good enough
    `- Differs                (exit 3)  an export is not what its manifest says

Every message is a sentence to whoever must act: what came, what is taken, what to do next.
"""

from __future__ import annotations

from typing import ClassVar

# After `| head -1`.
UNREAD = "nothing reads what is printed any more, so this stopped; a run that is not done goes on with --resume"


class OptimizeError(Exception):
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RecipeError(OptimizeError):
    exit_code = 2


class Refused(OptimizeError):
    exit_code = 2


class OutOfMemory(OptimizeError):
    pass


class Stopped(OptimizeError):
    exit_code = 4


class GateFailed(OptimizeError):
    exit_code = 3


class Differs(OptimizeError):
    exit_code = 3
