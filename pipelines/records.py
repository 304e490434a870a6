"""What stages leave for one another as JSON: typed records, read back whole or refused in one line."""

from pathlib import Path
from typing import Self

from pydantic import ValidationError

from anomaly_models.common.settings import Settings
from pipelines.errors import StageError
from pipelines.files import write_json


class Record(Settings):
    """One file's content. Strict, so that what another version of Blemish wrote is noticed and not guessed at."""

    def save(self, path: Path) -> None:
        """Write it atomically; fields that are None are written too."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path, remedy: str) -> Self:
        """Read what `save` wrote; `remedy` ends the message if that cannot be.

        Raises:
            StageError: there is no such file, or it is damaged or another version's.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise refusal(path, error, remedy) from None


def refusal(path: Path, error: Exception, remedy: str) -> StageError:
    """Why a file cannot be read, in one line."""
    if isinstance(error, FileNotFoundError):
        return StageError(f"{path}: not there; {remedy}")
    if isinstance(error, OSError):
        return StageError(f"{path}: {error.strerror}; {remedy}")
    reason = str(error)
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
    return StageError(f"{path}: damaged, or by another version of Blemish ({reason}); {remedy}")
