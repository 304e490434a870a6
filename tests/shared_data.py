"""Real data that some tests look at where it is there: a folder in the repository or beside it, and no part of it."""

from pathlib import Path


def shared_folder(name: str) -> Path | None:
    """`shared/data/<name>`, None where it is not here; a test then skips and says so."""
    repository = Path(__file__).parents[1]
    places = (parent / "shared" / "data" / name for parent in (repository, repository.parent))
    return next((place for place in places if place.is_dir()), None)
