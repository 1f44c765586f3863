"""How a preparation tells its caller how far it is; the library itself prints nothing."""

from typing import Protocol


class Progress(Protocol):
    """Receives progress: any callable with this signature."""

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Takes one report.

        Args:
            stage: What is being done, such as ``"extract email"``; a new name begins a new stage.
            done: Units finished so far (archives, documents or splits; 0 when the stage begins).
            total: Units in all, or ``None`` where that is not known in advance.
        """


def silent(stage: str, done: int, total: int | None) -> None:
    """Ignores every report."""
