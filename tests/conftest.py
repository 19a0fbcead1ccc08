"Shared by all tests: a copy of the repository, so that no test changes the checkout."
import functools
import gc
import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts tests in the background makes them deaf to it

from course import copy_course


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    "A cache folder that all tests share and nobody else sees."
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session", autouse=True)
def measured_on_two():
    "The validation loss before and after would take a third of the time of a run of three updates."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdxl_course.train.validation.FEW", 2)
        yield


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    "Copies of small caches go to no real home folder."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDXL_COURSE_CACHE", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    "No test finds what another one has encoded."
    monkeypatch.setenv("SDXL_COURSE_CACHE", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="session", autouse=True)
def drawn_in_five_steps():
    "A validation picture in its 20 steps would take longer than most trainings here."
    from sdxl_course.train import validation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "draw_pictures", functools.partial(validation.draw_pictures, steps=5))
        yield


@pytest.fixture
def all_steps(monkeypatch):
    "Validation pictures are drawn in as many steps as elsewhere."
    from sdxl_course.model.sampling import draw_pictures
    monkeypatch.setattr("sdxl_course.train.validation.draw_pictures", draw_pictures)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    "A copy of the repository in which notebooks may run."
    return copy_course(tmp_path_factory.mktemp("checkout") / "sdxl_course")


@pytest.fixture
def fresh_copy(tmp_path):
    "A copy of the repository for one test, to be changed at will."
    return copy_course(tmp_path / "sdxl_course")


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory):
    "Folder of a whole SDXL pipeline with a few thousand random weights: made for 64 pixels, an update takes milliseconds."
    from toy import make_toy_model
    return make_toy_model(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="session")
def upstream_pipe(tmp_path_factory):
    "Folder of the tiny pipeline of diffusers' own example tests."
    from toy import make_upstream_pipe
    return make_upstream_pipe(tmp_path_factory.mktemp("upstream") / "pipe")


@pytest.fixture
def make_pictures(tmp_path):
    "A function that fills a folder with small captioned pictures."
    from toy import make_pictures
    return lambda n=5, name="pictures", **options: make_pictures(tmp_path / name, n, **options)


@pytest.fixture(scope="session")
def toy(toy_model):
    "A function that gives the components of `toy_model`, fresh each time."
    from toy import load_toy
    return load_toy(toy_model)


@pytest.fixture
def hub(monkeypatch):
    "A hub in place of huggingface.co: see `Hub`."
    from toy import Hub
    monkeypatch.setattr("sdxl_course.train.hub.HfApi", Hub)
    monkeypatch.setattr("sdxl_course.train.hub.PAUSES", (0, 0))
    Hub.told, Hub.broken, Hub.sent = [], (), {}
    return Hub


@pytest.fixture
def train(tmp_path, toy, toy_model, make_pictures, monkeypatch):
    "A function that trains the toy model on five toy pictures in tmp_path/NAME; options are those of the command."
    from sdxl_course.text_to_image import TextToImageConfig, train_text_to_image
    data = make_pictures(5)
    usual = dict(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(data), resolution=64, train_batch_size=2, max_train_steps=3,
        learning_rate=1e-2, seed=0, report_to="none", checkpointing_steps=1000)

    def train(name="run", log=lambda text: None, curve=False, **options):
        if not curve: monkeypatch.setattr("sdxl_course.train.run.save_curve", lambda path, *points: Path(path).write_bytes(b""))  # a fifth of the time
        return train_text_to_image(TextToImageConfig(**{**usual, "output_dir": str(tmp_path / name), **options}), toy(), log)
    return train


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well: long ones, of which a shorter one shows the same in small")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; run with --slow only, as the workflow does")


@pytest.hookimpl(hookwrapper=True)
def pytest_collection(session):
    "What the test files import is left alone: garbage is looked for among what the tests make, and not in all the libraries again and again."
    gc.disable()
    yield
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config, items):
    "The longest first, so that no worker is left with a long one at the end; without the slow ones, unless they are asked for."
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    long = ("test_execute.py", "test_install.py", "test_pretrain.py", "test_evaluate.py", "test_study.py")
    items.sort(key=lambda item: item.path.name not in long)
