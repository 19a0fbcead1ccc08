"Installation. Every value comes from settings.ini; see CONTRIBUTING.md."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

extras = {
    "prodigy": ["prodigyopt>=1.1"],
    "8bit": ["bitsandbytes>=0.45"],
    "schedulefree": ["schedulefree>=1.4"],
    "tensorboard": ["tensorboard>=2.15"],
    "wandb": ["wandb>=0.17"],
    "comet": ["comet-ml>=3.40"],
    "trackio": ["trackio>=0.5"],
    "gradio": ["gradio>=5.0"],
    "heif": ["pillow-heif>=0.16"],
    "dev": cfg["dev_requirements"].split(),
}


def package_files():
    "Files of the package that are not modules: weights, configurations, vocabularies, texts of commands."
    root = here / cfg["lib_path"]
    wanted = {".safetensors", ".json", ".jsonl", ".txt", ".md", ".yaml", ".yml", ".jpg"}
    found = root.rglob("*")
    return [str(path.relative_to(root)) for path in sorted(found) if path.is_file() and path.suffix in wanted]


readme = here / "README.md"
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    url=cfg["git_url"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Natural Language :: English",
        *[f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)],
    ],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data={cfg["lib_path"]: package_files()},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split("\n")},
    zip_safe=False,
)
