"""The errors of the edges: settings and the services beside a worker."""

from pathlib import Path

from models.errors import HeadraceError

__all__ = [
    "HeadraceError",
    "ProgramMissing",
    "RegistryError",
    "ServiceFailed",
    "ServiceMissing",
    "ServicesBusy",
    "SettingsError",
    "UnknownService",
]


class SettingsError(HeadraceError):
    """A setting cannot be honoured. The text names the variable and what to write instead."""

    exit_code = 2


class UnknownService(HeadraceError):
    """A service was asked for by a name that none has."""

    exit_code = 2

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(f"There is no service {name!r}: choose among {', '.join(known)}.")


class ServiceMissing(HeadraceError):
    """A service that is needed is neither configured nor running under the data root."""

    def __init__(self, label: str, variable: str) -> None:
        super().__init__(f"No {label}: run `headrace up`, or set {variable}.")


class ProgramMissing(HeadraceError):
    """A service cannot be started because a program that it needs is not on this machine."""

    def __init__(self, label: str, lacks: str, remedy: str, variable: str) -> None:
        super().__init__(
            f"{label} cannot be started here: {lacks}. "
            f"{remedy}, or set {variable} to the address of a server that runs."
        )


class RegistryError(HeadraceError):
    """The registry of models cannot be asked, or refuses. What is loaded goes on."""


class ServiceFailed(HeadraceError):
    """A service did not start, answer or stop. With `log`, the text ends with the last lines of that file."""

    LINES = 12  # enough for the cause and what led to it, and still a screenful

    def __init__(self, label: str, what: str, log: Path | None = None) -> None:
        text = f"{label} {what}"
        if log is not None:
            written = log.read_text(errors="replace").splitlines() if log.exists() else []
            tail = "\n".join(f"  {line}" for line in written[-self.LINES :]) or "  (nothing)"
            text += f" Its log {log} ends with:\n{tail}"
        super().__init__(text)


class ServicesBusy(HeadraceError):
    """Another command is starting or stopping the services of the same data root, and does not finish."""

    def __init__(self, lock: Path, waited: float) -> None:
        super().__init__(
            f"Another `headrace up` or `down` holds {lock} for more than {waited:.0f} s: "
            "wait for it, or end it, and try again."
        )
