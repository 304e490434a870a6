"""MLflow; nothing else imports it. Here: what MLflow reads when it is imported, set before anyone does."""

import logging
import os

# No telemetry, and no warning about a machine without git.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# Never, whatever was set before: the addresses that it prints carry the user and the password of the store's.
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
for _chatty in ("alembic", "mlflow.store.model_registry.abstract_store"):
    logging.getLogger(_chatty).setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it prints 40 lines of what it raises anyway
