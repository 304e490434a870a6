"""What every section of a file of settings is. It stands here since the pipeline knows the models, and not they it."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Frozen and typed strictly; unknown keys and numbers that are not finite are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
