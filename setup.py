"""What a wheel holds: one package, `blemish`, with the repository in it; all else about it stands in pyproject.toml."""

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel

CODE = find_packages(include=["anomaly_models*", "pipelines*"])
INSIDE = "blemish.repository"


class InPlace(editable_wheel):
    """An editable install leads to the clone, whose code has the names there that it imports itself by."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.distribution.packages = ["blemish", *CODE]
        self.distribution.package_dir = {}
        self.distribution.py_modules = ["cli"]


setup(
    script_name="setup.py",  # which is thereby no module of the folder that it lies in
    packages=["blemish", INSIDE, *(f"{INSIDE}.{package}" for package in CODE)],
    package_dir={INSIDE: "."},
    package_data={
        # what `init` and `preset` put into a project
        INSIDE: ["dvc.yaml", "presets/*.yaml", ".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore"],
        f"{INSIDE}.pipelines.inference": ["drop.html"],
        f"{INSIDE}.pipelines.report": ["literature.yaml", "templates/*"],
    },
    include_package_data=False,
    cmdclass={"editable_wheel": InPlace},
)
