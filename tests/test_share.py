"What leaves the machine: cards with scores, notes and thumbnails in kohya files, pushes that only list; and the page to draw with LoRAs, in a real browser."
import base64
import io
import json
import shutil

import pytest
import yaml
from PIL import Image
from huggingface_hub import ModelCard
from course import chromium
from sdxl_course.app import Studio, add_to_history, find_loras, first_prompt, main as app, make_interface
from sdxl_course.cli import main as command
from sdxl_course.core import CourseError, load_tensors, seeded
from sdxl_course.model.adapters import inject_lora
from sdxl_course.model.lora_files import save_lora

REPORT = dict(num_pictures=6, judges=dict(clip="a|b", dino="c"), scores=[dict(name="dino", value=.5, low=.4, high=.6, floor=.1, ceiling=.9), dict(name="frechet_distance", value=9., low=None, high=None, floor=None, ceiling=None)])


# ------------------------------------------------ cards and files

def test_a_finished_run_is_ready_for_others(train, hub, tmp_path, capsys):
    "One run: its card, its kohya file, a push that lists, a push that takes scores along."
    folder = train("foxes", max_train_steps=1, validation_prompt="a | fox `x`", num_validation_images=1, output_kohya_format=True, checkpointing_steps=1).output_dir
    card = (folder / "README.md").read_text()
    python = card.split("```python")[1].split("```")[0]
    compile(python, "card", "exec")
    assert "from_pretrained" in python and "load_lora_weights" in python and "models/Lora" in card and "models/loras" in card and "5 pictures in `pictures`" in card
    tensors, notes = load_tensors(folder / "pytorch_lora_weights_kohya.safetensors")
    shown = Image.open(io.BytesIO(base64.b64decode(notes["modelspec.thumbnail"].removeprefix("data:image/jpeg;base64,"))))
    assert (shown.format, shown.size) == ("JPEG", (64, 64)) and notes["modelspec.usage_hint"] == "a | fox `x`" and notes["ss_steps"] == "1" and notes["ss_num_train_images"] == "5"
    assert notes["ss_network_dim"] and notes["modelspec.title"] == "foxes" and str(tmp_path) not in json.dumps(notes) and any(name.endswith(".alpha") for name in tensors)
    assert command(["push", str(folder), "--dry_run"]) == 0
    names = {line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert {"README.md", "image_0.png", "pytorch_lora_weights_kohya.safetensors", "config.yaml"} <= names and not any("checkpoint" in name for name in names)
    (tmp_path / "scores.json").write_text(json.dumps(REPORT))
    for _ in range(2): assert command(["push", str(folder), "--evaluation", str(tmp_path / "scores.json")]) == 0
    sent = hub.sent["README.md"].decode()
    data = ModelCard(sent).data
    assert [(one.metric_type, one.metric_value) for one in data.eval_results] == [("dino", .5), ("frechet_distance", 9.)] and data.eval_results[0].metric_args == dict(interval=[.4, .6])
    assert sent.count("## Evaluation") == 1 and "| dino | 0.500 | [0.400, 0.600] | 0.100 | 0.900 |" in sent and data.widget[0]["text"] == "a | fox `x`"
    assert yaml.safe_load(sent.split("---")[1])["model-index"][0]["name"] == "foxes"


def test_a_kohya_file_has_no_thumbnail_without_a_picture(train):
    folder = train("plain", max_train_steps=1, output_kohya_format=True).output_dir
    notes = load_tensors(folder / "pytorch_lora_weights_kohya.safetensors")[1]
    assert "modelspec.thumbnail" not in notes and notes["ss_learning_rate"] == "0.01" and notes["modelspec.resolution"] == "64x64"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"scores": []}', '"x"'])
def test_a_file_without_scores_pushes_nothing(tmp_path, content, capsys):
    (tmp_path / "training_log.jsonl").write_text(""), (tmp_path / "README.md").write_text("# x"), (tmp_path / "s.json").write_text(content)
    assert command(["push", str(tmp_path), "--evaluation", str(tmp_path / "s.json")]) == 2
    assert "nothing was pushed" in capsys.readouterr().err and (tmp_path / "README.md").read_text() == "# x"


# ------------------------------------------------ the page to draw with LoRAs

@pytest.fixture(scope="module")
def loras(tmp_path_factory, toy):
    folder, parts = tmp_path_factory.mktemp("loras"), toy()
    tensors = inject_lora({"unet": parts.unet}, 0, 2)
    for name in ("first", "second"):
        for key, x in tensors.items(): x.data.normal_(0, 3, generator=seeded("share", name, key))
        save_lora(folder / name, unet=parts.unet)
    (folder / "second" / "config.yaml").write_text("validation_prompts: [a fox]\n")
    return folder


def test_a_studio_draws_without_and_with_each_lora(loras, toy_model):
    studio, ask = Studio(str(toy_model), find_loras([loras])), dict(prompt="a fox", seed=1, steps=2)
    before, one = studio.draw(**ask, scales=[1, 0])
    same, two = studio.draw(**ask, scales=[0, 1])
    assert before.tobytes() == same.tobytes() and len({x.tobytes() for x in (before, one, two)}) == 3 and studio.names == ["first", "second"]
    again = studio.draw(**ask, scales=[1, 0])[1]
    assert again.tobytes() == one.tobytes() and studio.draw(**{**ask, "seed": 2}, scales=[0, 0])[0].tobytes() != before.tobytes()
    with pytest.raises(CourseError, match="no prompt"): studio.draw("")


def test_loras_are_found_in_files_and_folders(loras, tmp_path):
    shutil.copy(loras / "first" / "pytorch_lora_weights.safetensors", tmp_path / "style.safetensors")
    assert len(find_loras([loras, tmp_path / "style.safetensors", tmp_path])) == 4 and first_prompt(find_loras([loras])) == "a fox"
    with pytest.raises(CourseError, match="holds no LoRA"): find_loras([tmp_path / "nowhere"])
    assert len(add_to_history([(0, "")]*30, 1, 2, "x")) == 24


def test_without_gradio_the_app_says_so(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert app([]) == 2 and "pip install gradio" in capsys.readouterr().err


@pytest.fixture
def browser_page():
    pytest.importorskip("gradio")
    sync = pytest.importorskip("playwright.sync_api")
    place = chromium()
    with sync.sync_playwright() as driver:
        try: browser = driver.chromium.launch(executable_path=place, args=["--no-sandbox"])
        except Exception: pytest.skip("no browser")
        yield browser.new_page(viewport=dict(width=1200, height=1000))
        browser.close()


def test_the_page_draws_in_a_browser(browser_page, loras, toy_model, tmp_path):
    page, interface = browser_page, make_interface(Studio(str(toy_model), find_loras([loras])), "a fox", steps=1)
    _, address, _ = interface.launch(prevent_thread_lock=True, quiet=True)
    def drawn():
        page.get_by_role("button", name="Draw").click()
        page.wait_for_function("document.querySelectorAll('img').length >= 4", timeout=60_000)
        page.wait_for_timeout(1500)
        sources = [one.get_attribute("src") for one in page.locator("img").all()]
        return [Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB").tobytes() for source in sources[:2]]
    try:
        page.goto(address)
        page.get_by_label("Prompt", exact=True).wait_for(timeout=60_000)
        assert page.get_by_label("Prompt", exact=True).input_value() == "a fox"
        before, after = drawn()
        assert before != after
        for name in ("first", "second"):
            slider = page.get_by_label(f"number input for LoRA strength: {name}")
            slider.fill("0"), slider.press("Enter"), slider.blur()
        page.wait_for_timeout(500)
        off = drawn()
        assert off == [before, before]
        page.screenshot(path=tmp_path / "app.png")
        page.get_by_label("Prompt", exact=True).fill(" ")
        page.get_by_role("button", name="Draw").click()
        page.get_by_text("no prompt was given").first.wait_for(timeout=30_000)
    finally: interface.close()
