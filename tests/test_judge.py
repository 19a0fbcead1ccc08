"Anybody's pictures: metrics where the answer is known, folders of every kind, real CLIP and DINOv2 from a folder, the choice of a checkpoint."
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from hypothesis import given, settings, strategies as st
from sdxl_course import judge as judging
from sdxl_course.core import CourseError, seeded, seeded_rng
from sdxl_course.evaluate import EvaluateConfig, main
from sdxl_course.measure.distributions import frechet_by_size, frechet_distance, frechet_error, frechet_limit, kernel_distance
from sdxl_course.measure.metrics import interval_around
from sdxl_course.measure.pictures import Drawn, pair_up, read_drawn, read_parameters, says
from sdxl_course.measure.report import gallery_card, html_page, markdown_report
from sdxl_course.measure.scores import Score, View, copy_scores, grouped_interval, likeness_scores, make_score, nearness, prior_scores, set_scores
from sdxl_course.measure.towers import Seen, load_clip, load_dino
from sdxl_course.model.adapters import add_lora, lora_parameters
from sdxl_course.model.components import load_components, quiet
from sdxl_course.model.lora_files import save_lora
from sdxl_course.model.sampling import save_picture
from sdxl_course.world.samples import sample_dir
from sdxl_course.checkpoint_sweep import Point, choose, eligible


# ------------------------------------------------ distances of whole sets

def cloud(n, d=6, key=0, shift=0., scale=1.): return torch.randn(n, d, generator=seeded("cloud", key)).double()*scale + shift


@pytest.mark.parametrize("shift, scale", [(0., 1.), (2., 1.), (0., 3.), (1., 2.)])
def test_frechet_of_gaussians_with_known_distance(shift, scale):
    "Between N(0, 1) and N(shift, scale^2) in d dimensions: d*(shift^2 + (1 - scale)^2) (Dowson and Landau, 1982)."
    a = cloud(4000)
    assert frechet_distance(a, a*scale + shift) == pytest.approx(6*(shift**2 + (1 - scale)**2), abs=.12*max(1, scale)*6**.5)


def test_frechet_of_correlated_gaussians():
    "Where covariances do not commute there is a formula all the same; here it is evaluated by the matrix root of numpy."
    mix = torch.linalg.qr(cloud(6, key=3))[0]*torch.arange(1, 7) + cloud(6, key=5)*.3
    a, b = cloud(3000), cloud(3000, key=1) @ mix
    ca, cb = np.cov(a.T.numpy()), np.cov(b.T.numpy())
    values = np.linalg.eigvals(ca @ cb)
    want = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(ca) + np.trace(cb) - 2*np.sqrt(values.real.clip(0)).sum()
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-6)


def test_identical_and_permuted_sets_have_no_distance():
    a = cloud(40)
    shuffled = a[torch.randperm(40, generator=seeded("order"))]
    for other in (a, shuffled): assert frechet_distance(a, other) == pytest.approx(0, abs=1e-8)
    b = cloud(30, key=1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(shuffled, b), rel=1e-9)
    assert kernel_distance(a, b) == pytest.approx(kernel_distance(shuffled, b), rel=1e-9)
    assert kernel_distance(a, a)[0] < 0  # unbiased, and pairs of a picture with itself count for the distance only


def test_kernel_distance_is_the_mean_over_pairs():
    a, b = cloud(5, 3), cloud(4, 3, key=1)
    k = lambda x, y: (float(x @ y)/3 + 1)**3
    mean = lambda pairs: sum(k(x, y) for x, y in pairs)/len(pairs)
    want = mean([(a[i], a[j]) for i in range(5) for j in range(5) if i != j]) + mean([(b[i], b[j]) for i in range(4) for j in range(4) if i != j]) - 2*mean([(x, y) for x in a for y in b])
    assert kernel_distance(a, b)[0] == pytest.approx(want, rel=1e-9)


def test_of_few_pictures_the_frechet_distance_is_too_large_and_the_kernel_distance_is_not():
    "Forty pairs of sets from one distribution."
    pairs = [(cloud(16, 8, 2*k), cloud(16, 8, 2*k + 1)) for k in range(40)]
    frechet, kernel = ([distance(*pair) for pair in pairs] for distance in (frechet_distance, lambda a, b: kernel_distance(a, b)[0]))
    assert min(frechet) > 1 and abs(np.mean(kernel)) < 3*np.std(kernel)/40**.5
    a, b = cloud(1200, 8), cloud(1200, 8, 1)
    by_size = frechet_by_size(a, b, seeded("sizes"), (40, 80, 160, 600), draws=12)
    assert by_size[40] > 1.5*by_size[80] > 2.25*by_size[160] and abs(frechet_limit(by_size)) < by_size[160]/2


def test_jackknife_tells_the_spread_of_the_kernel_distance():
    found = torch.tensor([kernel_distance(cloud(20, 8, 2*k), cloud(20, 8, 2*k + 1, shift=.5)) for k in range(40)])
    assert .5 < float(found[:, 1].mean()/found[:, 0].std()) < 2


@pytest.mark.parametrize("shift, scale", [(0., 1.), (1., 1.), (1., 2.)])
def test_interval_of_the_frechet_distance_holds_the_known_distance_of_gaussians(shift, scale):
    "Sixty pairs of 200 points in four dimensions, where the bias, known from three hundred other pairs, is a small part; z = 1.96 or so."
    known, sets, inside, errors = 4*(shift**2 + (1 - scale)**2), lambda n, k: (cloud(n, 4, 2*k), cloud(n, 4, 2*k + 1, shift, scale)), 0, []
    bias = np.mean([frechet_distance(*sets(200, 1000 + k)) for k in range(300)]) - known
    for trial in range(60):
        pair = sets(200, trial)
        errors.append(frechet_error(*pair))
        low, high = interval_around(frechet_distance(*pair), errors[-1], 40)
        inside += low <= known + bias <= high
    assert abs(bias) < .2*max(known, 1) and 52 <= inside <= 60
    spread = np.std([frechet_distance(*sets(200, k)) for k in range(60)])
    assert .7 < np.mean(errors)/spread < (1.8 if shift == 0 else 1.4)  # where nothing differs the jackknife is too careful


def test_of_few_pictures_the_interval_is_that_of_so_many():
    "Twelve prompts with two like pictures each against ten references, in 30 dimensions: the mean of other sets lies inside, the true distance below."
    spectrum = torch.arange(1, 31).double()**-.5
    def sets(k, n=24, m=10):
        base = cloud(n//2, 30, 3*k).repeat_interleave(2, 0)*.8 + cloud(n, 30, 3*k + 1)*.6
        return view(base*spectrum, [f"prompt {i//2}" for i in range(n)]), view((cloud(m, 30, 3*k + 2) + .7)*spectrum)
    pairs = [set_scores(*sets(k))[0] for k in range(80)]
    known = frechet_distance(*(one.dino.features for one in sets(2000, 6000, 6000)))
    fresh = [set_scores(*sets(1000 + k))[0] for k in range(100)]
    for which, name in enumerate(("frechet_distance", "kernel_distance")):
        values = [one[which].value for one in fresh]
        assert sum(pair[which].low <= np.mean(values) <= pair[which].high for pair in pairs) >= 70, name
        width = np.mean([pair[which].high - pair[which].low for pair in pairs])
        assert 3 < width/np.std(values) < 8, name
    assert np.mean([pair[0].low for pair in pairs]) > known  # which no interval around so few pictures' distance can hold


def test_pictures_of_a_prompt_that_are_alike_widen_the_interval():
    "A prompt's pictures drawn over and over tell nothing new; one prompt alone gives no interval."
    a, b = cloud(8, 5), cloud(200, 5, 1)
    same = a.repeat_interleave(4, 0)
    groups = [k//4 for k in range(32)]
    assert frechet_error(same, b, groups) > 1.2*frechet_error(same, b)
    assert kernel_distance(same, b, groups)[1] > 1.2*kernel_distance(same, b)[1]
    assert frechet_error(a, b, [0]*8) == kernel_distance(a, b, [0]*8)[1] == math.inf
    one = set_scores(view(a, ["only"]*8), view(b))[0]
    assert all(not math.isfinite(score.high) for score in one)


def test_sets_of_the_same_prompts_are_left_out_together():
    "Where both sets have much in common, pair by pair, their distance varies less than that of strangers."
    inside, errors, values = 0, [], []
    for k in range(40):
        both = cloud(30, 4, 2*k)*3
        a, b = both + cloud(30, 4, 2*k + 1), both + cloud(30, 4, 5000 + k) + 1
        values.append(frechet_distance(a, b)); errors.append((frechet_error(a, b, paired=True), frechet_error(a, b)))
    paired, alone = np.mean(errors, 0)/np.std(values)
    assert .6 < paired < 1.5 and alone > 1.5*paired


# ------------------------------------------------ scores of made-up features

def view(embeds, prompts=None, seeds=None, style=None, small=None):
    unit = torch.nn.functional.normalize(torch.as_tensor(embeds).float(), dim=-1)
    seen = Seen(unit, unit, unit if style is None else style)
    n = len(unit)
    drawn = [Drawn(Path(f"x/{k}.png"), *pair) for k, pair in enumerate(zip(prompts or [f"p{k}" for k in range(n)], seeds or ["0"]*n))]
    return View(drawn, seen, seen, unit if small is None else small)


def value(scores): return {one.name: one.value for one in scores}


def test_likeness_is_zero_at_the_base_model_and_one_at_the_references():
    thing, other = torch.eye(4)[:1], torch.eye(4)[1:2]
    near = lambda share, n, key: share*thing + (1 - share)*other + .05*cloud(n, 4, key).float()
    references, before = view(near(1, 6, 0)), view(near(0, 6, 1))
    for share, low, high in ((0, -.1, .1), (.5, .5, .95), (1, .9, 1.1)):
        found = value(likeness_scores(view(near(share, 200, 2)), references, before))
        assert low < found["subject_fidelity"] < high
    found = likeness_scores(before, references, before)
    assert value(found)["subject_fidelity"] == pytest.approx(0, abs=1e-6)


def test_random_features_say_nothing():
    one, other, references = (view(cloud(60, 64, key).float()) for key in range(3))
    found = {score.name: score for score in likeness_scores(one, references, other)}
    assert abs(found["dino"].value) < .05 and "subject_fidelity" not in found  # no scale where floor and ceiling are one


def test_leaks_and_drift_are_looked_for_where_nothing_was_asked():
    prompts = ["sks a", "sks b", "c", "d"]
    references = view([[1, 0, 0.]]*3)
    before = view([[0, 1, 0.]]*4, prompts)
    learnt = view([[1, 0, 0.]]*2 + [[0, 1, 0.]]*2, prompts)
    leaked = view([[1, 0, 0.]]*4, prompts)
    assert value(prior_scores(learnt, references, before, ["sks"])) == pytest.approx(dict(pres=0, change=1, drift=0), abs=1e-6)
    assert value(prior_scores(leaked, references, before, ["sks"])) == pytest.approx(dict(pres=1, change=1, drift=1), abs=1e-6)
    turned = view(leaked.dino.embeds[[2, 3, 0, 1]], [prompts[k] for k in (2, 3, 0, 1)])  # the order of files is nothing
    assert value(prior_scores(turned, references, before, ["sks"])) == pytest.approx(dict(pres=1, change=1, drift=1), abs=1e-6)


def test_variety_is_within_a_prompt():
    alike = view([[1, 0.], [1, 0], [0, 1], [0, 1]], ["a", "a", "b", "b"], ["1", "2", "1", "2"])
    unlike = view([[1, 0.], [0, 1], [1, 0], [0, 1]], ["a", "a", "b", "b"], ["1", "2", "1", "2"])
    assert value(prior_scores(alike))["div"] == pytest.approx(0, abs=1e-6) and value(prior_scores(unlike))["div"] == pytest.approx(1)


def test_copies_are_told_from_pictures_that_cannot_be_any():
    learnt, fresh = cloud(6, 32).float(), cloud(12, 32, 1).float()
    mirrored = view(learnt, small=torch.nn.functional.normalize(torch.cat([learnt, -learnt]), dim=-1))
    (near, share), which = copy_scores(view(learnt + .01), mirrored, view(fresh))
    assert share.value == 1 and near.value > .99 and which == list(range(6))
    assert copy_scores(view(-learnt), mirrored, view(fresh))[1] == list(range(6))  # mirror images count as the same picture
    shares = [copy_scores(view(cloud(12, 32, key).float()), mirrored, view(fresh)) for key in range(2, 42)]
    assert np.mean([one[0][1].value for one in shares]) == pytest.approx(1/19, abs=.04)  # what the floor says
    style = view(cloud(6, 32, 50).float()*.3 + 1)  # training pictures that are alike: new ones in their style are no copies, though the base model's are further
    alike = view(style.clip.embeds, small=torch.cat([style.small, style.small]))
    assert copy_scores(view(cloud(12, 32, 51).float()*.3 + 1), alike, view(fresh))[0][1].value < .4


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5)), min_size=2, max_size=30))
def test_an_interval_over_prompts_lies_within_the_values(rows):
    groups, values = zip(*rows)
    low, high = grouped_interval(values, groups, seeded("x"), times=100)
    if len(set(groups)) < 2: assert (low, high) == (-math.inf, math.inf)
    else: assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_intervals_over_prompts_hold_the_truth_where_ordinary_ones_do_not():
    "Thirty pictures of six prompts, whose means differ more than the pictures of one prompt do."
    inside = dict(prompts=0, pictures=0)
    for trial in range(60):
        means, noise = cloud(1, 6, trial)[0], cloud(6, 5, trial + 500)*.2
        values = (means[:, None] + noise).flatten()
        for name, groups in dict(prompts=[k//5 for k in range(30)], pictures=range(30)).items():
            low, high = grouped_interval(values, groups, seeded("trial", trial), times=300)
            inside[name] += low <= 0 <= high
    assert inside["prompts"] >= 45 > inside["pictures"] + 8  # six prompts give 85 % or so, not 95: they are few


def test_sets_are_told_apart_and_halves_are_not():
    a, b = view(cloud(40, 8).float() + 3), view(cloud(40, 8, 1).float() - 3)
    apart, told = set_scores(a, b, a)
    found = {score.name: score for score in apart}
    for name in ("frechet_distance", "kernel_distance"): assert found[name].value > 5*abs(found[name].floor)
    assert found["kernel_distance"].low > 0 and list(told["frechet_by_size"]) == [10, 20, 30, 40] and set_scores(view(torch.eye(3)), b) == ([], {})


def test_the_loss_by_level_of_an_offloaded_model(tmp_path, monkeypatch):
    "Networks that take turns give the same numbers, with a LoRA and without it; on a CPU there is nothing to spare. (Layer by layer is for tests/gpu: accelerate's hooks fail from CPU to CPU.)"
    unet, here, real, asked = load_components("tiny").unet, torch.device("cpu"), judging.load_pipeline, []
    for name, p in lora_parameters(add_lora(unet, rank=2, generator=seeded("level"))): p.data = 0.1*torch.randn(p.shape, generator=seeded(name))
    for path in sorted(sample_dir("chairs").glob("*"))[:2] + [sample_dir("chairs")/"metadata.jsonl"]: shutil.copy(path, tmp_path)
    rows = (tmp_path/"metadata.jsonl").read_text().splitlines()
    (tmp_path/"metadata.jsonl").write_text("".join(f"{row}\n" for row in rows if (tmp_path/json.loads(row)["file_name"]).exists()))
    def load(*given, offload=None, **more):
        asked.append(offload)
        pipeline = real(*given, device="cpu", **more)
        if offload: pipeline.enable_model_cpu_offload(device=here)
        return pipeline
    monkeypatch.setattr(judging, "load_pipeline", load)
    usual = dict(validation_data_dir=str(tmp_path), lora=str(save_lora(tmp_path/"lora", unet)))
    plain, spared = (judging.level_report(EvaluateConfig(**usual, **more), 3) for more in ({}, dict(offload="model")))
    assert asked == [None, "model"] and spared["timesteps"] == plain["timesteps"] and plain["tuned"] != plain["base"]
    for name in ("base", "tuned", "low", "high"): assert spared[name] == pytest.approx(plain[name], rel=1e-4), name
    monkeypatch.undo()
    with pytest.raises(CourseError, match="draws on the CPU"): judging.level_report(EvaluateConfig(**usual, offload="model"), 3)


# ------------------------------------------------ folders

def picture(path, key=0, notes=None):
    small = np.random.default_rng(key).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return save_picture(Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC), path, notes)


@pytest.mark.parametrize("kind", ["notes", "parameters", "jsonl", "csv", "txt"])
def test_prompts_are_found_wherever_they_are(tmp_path, kind):
    for k in range(2):
        inside = dict(prompt=f"a fox, {k}", seed=k) if kind == "notes" else dict(parameters=f"a fox, {k}\nNegative prompt: x\nSteps: 9, Seed: {k}, Size: 9x9") if kind == "parameters" else None
        picture(tmp_path / f"{k}.png", k, inside)
        if kind == "txt": (tmp_path / f"{k}.txt").write_text(f"a fox, {k}\n")
    if kind == "jsonl": (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(dict(file_name=f"{k}.png", text=f"a fox, {k}")) + "\n" for k in range(2)))
    if kind == "csv": (tmp_path / "metadata.csv").write_text('file_name,text\n0.png,"a fox, 0"\n1.png,"a fox, 1"\n')
    drawn, remarks = read_drawn(tmp_path)
    assert [one.prompt for one in drawn] == ["a fox, 0", "a fox, 1"] and remarks == []
    assert [one.seed for one in drawn] == (["0", "1"] if kind in ("notes", "parameters") else ["", ""])


def test_what_generate_writes_is_read(tmp_path, toy_model):
    from sdxl_course.inference import main as generate
    assert generate(["--model", str(toy_model), "--prompt", "a red | house", "--num_images", "2", "--seed", "5", "--num_inference_steps", "1", "--output_dir", str(tmp_path)]) == 0
    drawn, remarks = read_drawn(tmp_path)
    assert [(one.prompt, one.seed) for one in drawn] == [("a red | house", "5"), ("a red | house", "6")] and "grid.png" in remarks[0]


@pytest.mark.parametrize("make, message", [
    (lambda folder: None, "is not there"), (lambda folder: folder.mkdir(), "no pictures in"),
    (lambda folder: (picture(folder / "0.png"), (folder / "metadata.jsonl").write_text("{")), "line 1 is not JSON"),
    (lambda folder: (folder.mkdir(), (folder / "0.png").write_bytes(b"no picture")), "0.png"),
])
def test_folders_that_cannot_be_judged_are_refused(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(CourseError, match=message): read_drawn(tmp_path / "x")


def test_before_and_after_are_paired_by_what_they_show():
    one = [Drawn(Path(f"a/{k}.png"), f"p{k//2}", str(k % 2)) for k in range(6)]
    order = [5, 2, 0, 3]
    assert pair_up(one, [one[k] for k in order]) == sorted((k, n) for n, k in enumerate(order))


def test_a_trigger_is_a_word_and_no_part_of_one():
    assert says("A SKS dog", ["sks"]) and not says("sksdog", ["sks"]) and says("an old-book picture", ["old-book"]) and says("anything", None)
    assert read_parameters("no steps at all") == ("no steps at all", "")


# ------------------------------------------------ towers of real kinds, with random weights

@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model
    folder, tokenizer = tmp_path_factory.mktemp("towers"), load_components("tiny").tokenizer
    size = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(size, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    with quiet(), seeded_rng("towers"):
        CLIPModel(CLIPConfig(text_config=text, vision_config=dict(size, image_size=28, patch_size=14), projection_dim=16)).save_pretrained(folder / "clip")
        Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)).save_pretrained(folder / "dino")
    tokenizer.save_pretrained(folder / "clip")
    return folder


def test_real_towers_see_what_transformers_see(towers):
    from transformers import Dinov2Model
    from sdxl_course.measure.towers import IMAGENET_COLORS
    dino = load_dino(towers / "dino")
    pictures = [Image.effect_noise((60, 40), 80 + k).convert("RGB") for k in range(3)]
    with quiet(): model = Dinov2Model.from_pretrained(towers / "dino").eval()
    side = [one.resize((42, 28), Image.Resampling.BICUBIC).crop((7, 0, 35, 28)) for one in pictures]
    mean, spread = (torch.tensor(one).view(3, 1, 1) for one in IMAGENET_COLORS)
    pixels = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1)/255 for one in side])
    with torch.no_grad(): want = model(pixel_values=(pixels - mean)/spread).pooler_output
    assert torch.allclose(dino.see(pictures).features, want, atol=.05) and (dino.see(pictures).embeds @ torch.nn.functional.normalize(want, dim=-1).T).diagonal().min() > .999
    assert torch.equal(dino.see(pictures, batch_size=1).embeds[2], dino.see(pictures[2:]).embeds[0])


def test_colours_are_those_that_the_model_names(towers, tmp_path):
    import shutil
    folder = Path(shutil.copytree(towers / "dino", tmp_path / "dino"))
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(image_mean=[.5]*3, image_std=[.5]*3)))
    assert load_dino(folder).colors == ((.5,)*3,)*2


def test_weights_that_are_missing_are_not_made_up(towers, tmp_path):
    import shutil
    from safetensors.torch import load_file, save_file
    folder = Path(shutil.copytree(towers / "dino", tmp_path / "dino"))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "query" in name)
    save_file({k: v for k, v in tensors.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CourseError, match="lacks 1 weights"): load_dino(folder)


@pytest.mark.parametrize("words, message", [("--clip dino", "wanted a CLIP"), ("--dino clip", "wanted a vision transformer"), ("--clip nowhere", "there is no model")])
def test_a_wrong_tower_is_named(towers, tmp_path, words, message, capsys):
    picture(tmp_path / "0.png", 0, dict(prompt="x"))
    flag, name = words.split()
    assert main(["--images", str(tmp_path), flag, str(towers / name)]) == 2 and message in capsys.readouterr().err


def test_the_command_judges_a_folder_with_the_towers_that_are_named(towers, tmp_path, capsys):
    for k in range(4):
        prompt = f"{'sks ' if k < 2 else ''}fox {k}"
        picture(tmp_path / "after" / f"{k}.png", k, dict(prompt=prompt, seed=k))
        picture(tmp_path / "before" / f"{k}.png", k + 10*(k < 2), dict(prompt=prompt, seed=k))
        picture(tmp_path / "references" / f"{k}.jpg", k)
    places = {name: tmp_path / f"new.{end}" for name, end in dict(output="json", markdown="md", html="html", grid="png").items()}
    words = ["--images", tmp_path / "after", "--base_images", tmp_path / "before", "--references", tmp_path / "references", "--trigger", "sks", "--clip", towers / "clip", "--dino", towers / "dino"]
    words += [word for name, place in places.items() for word in (f"--{name}", place)]
    assert main([str(word) for word in words]) == 0
    told, report = capsys.readouterr().out, json.loads(places["output"].read_text())
    found = {row["name"]: row for row in report["scores"]}
    assert found["drift"]["value"] == pytest.approx(0, abs=1e-5) and found["change"]["value"] > .01 and found["nearest_training"]["value"] > .9
    assert [row["prompt"] for row in report["pictures"]] == ["sks fox 0", "sks fox 1", "fox 2", "fox 3"] and report["judges"]["dino"] == str(towers / "dino")
    assert "know the small world" not in told and all(name in told and name in places["markdown"].read_text() for name in found)
    page = places["html"].read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == [] and page.count("<figure data-") == 4 and Image.open(places["grid"]).size[0] > 400


@pytest.mark.parametrize("words, message", [
    ("--images x --fidelity --clip y", "small world only"), ("--images x --prompts y --clip z", "not both"), ("--html x.html", "nothing to judge"),
    ("--references nowhere --images nowhere", "--images 'nowhere' is not there"), ("--prompts nowhere.txt --html x.html", "--prompts nowhere.txt"), ("--sweep nowhere --prompts x", "--sweep nowhere is no folder"),
    ("--images x --lora y --html z", "take no LoRA"), ("--base_images x --prompts y", "without --images"),
])
def test_options_without_meaning_end_in_a_sentence(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2 and message in capsys.readouterr().err


def test_words_of_others_stay_words():
    nasty = '<img src=x onerror=alert(1)> "quoted" | `code` [link](http://x)'
    card = gallery_card([(Image.new("RGB", (8, 8)), nasty)], nasty, dict(clip_t=.5))
    page = html_page(nasty, [nasty], [make_score("dino", [.1, .2], [0, 1], 0., 1.)], [], [card], ["clip_t"])
    assert "<img src=x" not in page and page.count("&lt;img src=x") == 5 and "onerror=alert(1)>" not in page
    row = vars(Score("dino", .5, .4, .6, 3, .1, .9))
    text = markdown_report(dict(name=nasty, remarks=[nasty], scores=[row], num_pictures=3, judges=dict(clip=nasty)))
    assert "<img" not in text.replace("\\<img", "") and all(line.count("|") - line.count("\\|") == 8 for line in text.splitlines() if line.startswith("|"))


# ------------------------------------------------ which checkpoint

def point(name, likeness, cost, step): return Point(name, step, 1., name, np.array(likeness, float), np.array(cost, float), tuple(range(len(likeness))), tuple(range(len(cost))), 0., 0.)


def test_more_likeness_is_kept_where_it_shows_and_less_drift_where_it_does_not():
    noise = cloud(1, 12)[0].numpy()*.05
    base, early, good, late = (point(n, level + noise*k, [drift]*4, step) for n, level, k, drift, step in (("base", 0, 0, 0, 0), ("early", .2, 1, .05, 1), ("good", .6, 1, .1, 2), ("late", .605, -1, .5, 3)))
    assert choose([base, early, good, late]).name == "good" and eligible([base, early, good, late]) == [False, False, True, True]
    better = point("better", good.likeness + .02, [.5]*4, 4)  # in every single picture
    assert choose([base, early, good, better]).name == "better"
    nothing = [point(n, noise*k, [drift]*4, 1) for n, k, drift in (("base", 0, 0), ("a", 1, .1), ("b", -1, .2))]
    assert choose(nothing).name == "base"


def test_a_sweep_measures_each_checkpoint_at_each_strength(train, toy_model, make_pictures, tmp_path, capsys):
    train("run", checkpointing_steps=1, max_train_steps=2, validation_prompts=["one", "two", "three"], num_validation_images=1, skip_final_inference=True)
    words = f"--sweep {tmp_path/'run'} --scales 0 1 --num_images 1 --num_inference_steps 1 --output {tmp_path/'s.json'} --plot {tmp_path/'s.png'} --html {tmp_path/'s.html'}"
    assert main(words.split()) == 0
    report = json.loads((tmp_path / "s.json").read_text())
    rows = {row["name"]: row for row in report["points"]}
    assert list(rows) == ["base model", "1 x 0", "1 x 1", "2 x 0", "2 x 1"] and sum(row["kept"] for row in report["points"]) == 1
    assert rows["2 x 0"]["likeness"] == rows["base model"]["likeness"] != rows["2 x 1"]["likeness"] and report["cost"] == "CLIP-T lost"
    assert Image.open(tmp_path / "s.png").size[0] > 500 and report["kept"] in capsys.readouterr().out
    assert main(f"--sweep {tmp_path/'run'} --prompts {tmp_path/'nowhere'}".split()) == 2
