"""What the document promised, and where the course keeps it: one row for each section, concept, table, example, method and result.

A row names a page, a section of it ("-": before the first), the kind of cell, and words of that very cell: a call or a line of code that does
the thing, a heading or a phrase that says it. It fails when the cell is gone, was moved to another section, or is code that no longer runs.
That code does what it should is another test's matter, which runs every page."""
import re
from types import SimpleNamespace

import pytest

from course import NBS, NOTEBOOKS, holds_imports, is_skipped, kind, lines_of, page_name, read

COVERED = """
results: old book illustrations, the style | 40_text_to_image | - | code | show_images([open_image(r.path) for r in records[:8]]
results: my green chair, the object | 41_dreambooth | - | code | pictures = [open_image(path) for path in sorted(data.glob("*.png"))]
results: old book illustrations, the four prompts | 42_result_old_book | What does it draw? | code | DOCUMENT = ("A dachshund walks confidently down a dirt path", "A sailboat sailing the ocean", "A diagram of a wolf skeleton", "A carnival in the distance")
results: old book illustrations, before and after | 42_result_old_book | Before and after | code | for when in ("wanted", "before", "after")
results: old book illustrations, its data set | 42_result_old_book | - | text | huggingface.co/datasets/AdamLucek/oldbookillustrations-small
results: old book illustrations, its model | 42_result_old_book | - | text | huggingface.co/AdamLucek/sdxl-base-1.0-oldbookillustrations-lora
results: old book illustrations, its notebook | 42_result_old_book | - | text | SDXL LoRA OldBookIllustrations.ipynb
results: old book illustrations, how long it took | 42_result_old_book | - | text | three and a half hours
results: the green chair, its four prompts | 43_result_green_chair | What does it draw? | code | DOCUMENT = ("in front of the great pyramids"
results: the green chair, its reference | 43_result_green_chair | - | code | show_images(learnt, places
results: the green chair, its data set | 43_result_green_chair | - | text | huggingface.co/datasets/AdamLucek/green-chair
results: the green chair, its model | 43_result_green_chair | - | text | huggingface.co/AdamLucek/sdxl-base-1.0-greenchair-dreambooth-lora
results: the green chair, its notebook | 43_result_green_chair | - | text | SDXL LoRA DreamBooth GreenChair.ipynb
results: the green chair, its pictures | 43_result_green_chair | The result | code | result = dict(wanted=truth, before=generate(
architecture: the picture of the parts | 10_components | Which parts are there, and who talks to whom? | text | ](images/10_box.svg)
architecture: positive and negative prompt | 50_inference | How do we say what we do not want? | code | against = generate(pipeline, plain, two, **quick, negative_prompt=colors)
architecture: two text encoders, and which is which | 10_components | Which parts are there, and who talks to whom? | text | `text_encoder_2` is OpenCLIP ViT-bigG/14
architecture: two text encoders, their sizes | 10_components | How big is the real one? | code | text_encoder=123_060_480, text_encoder_2=694_659_840
architecture: embeddings are joined | 11_conditioning | Which layer's answer does SDXL take? | code | by_hand = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
architecture: what the refiner hears | 10_components | Which parts are there, and who talks to whom? | text | fed by bigG alone
architecture: the refiner, which takes over | 10_components | Which parts are there, and who talks to whom? | text | takes over the last, least noisy share of the steps
architecture: the refiner, drawing | 54_refiner | What does the second one change? | code | refined = {share: generate_refined(pipeline, refiner, prompt, 0, share, **quick)[0] for share in shares}
architecture: seed and noise | 01_draw | What does the seed do? | text | The seed is the number of that noise
architecture: a seed repeats a picture | 01_draw | What does the seed do? | code | again = generate(pipeline, "a photo of a red house in the snow"
architecture: the UNet, down and up again | 10_components | How does one step change shape? | code | small, large = listen(one, 32), listen(real, 128)
architecture: its transformers | 10_components | Is the UNet a stack of convolutions? | code | test_eq(sum(depth.values()), 70)
architecture: the scheduler and the loop | 50_inference | What happens between a prompt and a picture? | code | x = scheduler.step(without + guidance * (with_prompt - without), t, x).prev_sample
architecture: VAE decoder | 10_components | What does the autoencoder keep of a picture? | code | back = tiny.vae.decode(mean).sample
architecture: which parts learn | 05_methods | What trains? | text | Orange: all its weights learn.
methodology: seven steps in one figure | 04_seven_steps | - | code | HTML(drawing())
methodology: 1, load a trained model | 04_seven_steps | 1. Load a model that can draw already | code | before = generate(model.pipeline(), prompts, seeds=1
methodology: 2, resize, crop and flip | 04_seven_steps | 2. Prepare the data | code | prepare_image(open_image(record.path), side, center_crop=True)
methodology: 2, flip, seen | 21_preprocess | In which order: flip, then crop? | text | Mirroring is the simplest
methodology: 2, tokens | 11_conditioning | Into which pieces is a sentence cut? | code | "a red chair and a flibbertigibbet in the desert"
methodology: 2, encode text | 04_seven_steps | 2. Prepare the data | code | words, pooled = encode_prompts(model,
methodology: 2, encode pictures | 04_seven_steps | 2. Prepare the data | code | posterior(model.vae
methodology: 2, what the VAE gives back | 22_cache | What does the autoencoder give back? | code | means differ by
methodology: 2, encode before training | 22_cache | What does the trainer take out? | code | for epoch in range(3): entries = [cache.entry(
methodology: 3, hyperparameters | 04_seven_steps | 3. Choose the numbers | code | learning_rate, batch_size, updates
methodology: 4a, sample noise | 04_seven_steps | 4. Train | code | rows, noise = draw_rows(0), draw_noise(0)
methodology: 4b, sample a timestep | 04_seven_steps | 4. Train | code | timesteps = draw_timesteps(0)
methodology: 4c, add the noise | 04_seven_steps | 4. Train | code | noisy = schedule.add_noise(latents[rows], noise, timesteps)
methodology: 4d, predict the noise | 04_seven_steps | 4. Train | code | answer = predict(rows, noisy, timesteps)
methodology: 4d, noise and not a difference | 13_noise | What is the model asked for? | text | That is another tensor, and a network trained on it would be another network.
methodology: 4e, the loss | 04_seven_steps | 4. Train | code | loss = (answer - noise).square().mean()
methodology: 4f, backpropagate | 04_seven_steps | 4. Train | code | sizes = {name: p.grad.abs().mean().item() for name, p in trained.items()}
methodology: 4g, repeat and validate | 04_seven_steps | 4. Train | code | if update % 8 == 0: marks.append(measure())
methodology: 5, draw | 04_seven_steps | 5. Draw with it | code | after = generate(model.pipeline(), prompts, seeds=1
methodology: 6, write down | 04_seven_steps | 6. Write it down | code | file = save_lora(
methodology: 7, share | 04_seven_steps | 7. Share it | code | load_pipeline("tiny", lora=file, device="cpu")
methodology: all weights of the UNet | 67_full | What does it learn, and what does it forget? | code | models, curves = zip(*[train(config) for config in configs.values()])
LoRA: overfitting | 57_overfitting | - | text | learns its pictures by heart
LoRA: overfitting, seen | 57_overfitting | What do the two losses say? | code | gap = curve(live, way, "gap")
LoRA: catastrophic forgetting | 57_overfitting | - | text | *Catastrophic forgetting*
LoRA: catastrophic forgetting, seen | 57_overfitting | What is forgotten? | code | sheet = [drawn["lora"][0]["unrelated"]
LoRA: against full fine-tuning | 57_overfitting | Watch it | code | for way in ("lora", "full")
LoRA: frozen weights | 15_lora | What does the side path look like? | code | layer.B.grad.abs().max() > 0 and base.weight.grad is None
LoRA: injectable modules | 15_lora | Is it the layer that everybody uses? | code | def peft_layer(base, A, B, alpha, **options)
LoRA: low-rank update matrices | 15_lora | What does the side path look like? | code | class LoRALinear(nn.Module)
LoRA: full rank and low rank | 14_rank | Then why is a narrow change enough? | code | wholes = {k: with_weights(cut_to(k, after)) for k in ks}
LoRA: fewer trained parameters | 04_seven_steps | 1. Load a model that can draw already | code | parameters learn
LoRA: less memory | 81_cloud | How much memory does it take? | code | GiB to train; the whole UNet
LoRA: the projections of attention | 15_lora | Which layers of SDXL get a path? | code | test_eq(lora_targets(sdxl.unet), ["to_q", "to_k", "to_v", "to_out.0"])
LoRA: the other layers may learn as well | 80_arguments | What does the rank cost? | code | for layers in ("attention", "attention+feedforward+convolution")
context: attention, queries, keys and values | 12_attention | What is one look made of? | text | Each place asks a *query*, each word offers a *key* and a *value*
context: attention, by hand | 12_attention | What is one look made of? | code | shares = scores.softmax(-1)
context: attention, the output projection | 12_attention | What is one look made of? | code | return layer.to_out[0](mixed), scores, shares
context: attention, its weights seen | 12_attention | What is one look made of? | code | for axis, values, title in zip(axes, (scores, shares), ("scores", "shares"))
context: attention, what is looked at | 12_attention | Where is a word looked for? | code | seen = attention_maps(pipeline, prompt, 0
context: cross-attention | 12_attention | What is one look made of? | text | This was *cross-attention*
context: self-attention is the same arithmetic | 12_attention | What is one look made of? | code | test_close(by_hand(other, caught["x"], caught["x"])[0], theirs, eps=1e-4)
context: self-attention of a place | 12_attention | What does a place look at? | code | place_attention(pipeline, prompt, 0, place
context: attention, values and keys exchanged | 12_attention | What if one word is exchanged? | code | class ValuesFrom
context: transformers, all at once | 12_attention | What is one look made of? | text | all at once, and none waits for the one before it
context: transformers, the blocks of the UNet | 10_components | Is the UNet a stack of convolutions? | text | Seventy transformer blocks with more than four fifths of all parameters
context: rank, its definition | 14_rank | How many rows say something new? | text | Two rows are left, and this number is the **rank**
context: rank, the example of three rows | 14_rank | How many rows say something new? | code | A = [[1, 2, 1], [-2, -3, 1], [3, 5, 0]]
context: rank, row by row to the echelon form | 14_rank | How many rows say something new? | code | test_eq(echelon, [[1, 0, -5], [0, 1, 3]])
context: rank, two factors hold all of it | 14_rank | How many rows say something new? | code | test_eq(left @ right, matrix)
context: rank, low-rank approximation | 14_rank | What does a picture look like at rank k? | code | def low_rank(
context: rank, a picture at low rank | 14_rank | What does a picture look like at rank k? | code | cut = {style: [torch.mm(*low_rank(x, k)) for k in ranks]
context: rank, why a narrow change is enough | 14_rank | Then why is a narrow change enough? | code | share of the gain:
DreamBooth: a rare word and its class | 41_dreambooth | What shall we call it? | text | The rare word, the *identifier*, gets the new meaning.
DreamBooth: key concept 1, the unique identifier | 43_result_green_chair | Idea one: a unique identifier | text | Idea one: a unique identifier
DreamBooth: key concept 2, the language-vision dictionary | 43_result_green_chair | Idea two: a language-vision dictionary | text | Idea two: a language-vision dictionary
DreamBooth: key concept 2, taken apart | 43_result_green_chair | Idea two: a language-vision dictionary | code | halves = {"neither": base.pipeline()
DreamBooth: key concept 3, class-specific prior preservation | 43_result_green_chair | Idea three: class-specific prior preservation | text | Idea three: class-specific prior preservation
DreamBooth: language drift | 43_result_green_chair | Idea three: class-specific prior preservation | text | *language drift*
DreamBooth: diversity of the class | 43_result_green_chair | Idea three: class-specific prior preservation | code | prior_metrics(scorer.embed(some), ours)
DreamBooth: prior preservation | 41_dreambooth | What must not be forgotten? | code | class_file(config.class_data_dir, 2).unlink()
DreamBooth: the loss of prior preservation | 30_objective | How does a class stay what it was? | code | both = prior_preservation(weighted, 0.3)
DreamBooth: reliable generation of one subject | 41_dreambooth | Does it work? | code | result = train_dreambooth(config, components, log)
DreamBooth: applications, measured | 52_study | What came out? | code | print(application_table(study))
DreamBooth: five applications, recontextualization to accessories | 52_study | What do we ask it to draw? | code | prompts = {name: subject_prompt(application_scenes(name)[0], "sks chair") for name in APPLICATIONS}
DreamBooth: five applications, pictures | 52_study | What came out? | text | The first of six pictures of each application
methods: ControlNet | 60_controlnet | How does a frozen model hear of it? | code | torch.nn.init.zeros_(layer.weight)
methods: ControlNet, trained | 60_controlnet | How is one trained? | code | zip(live.unet.parameters(), components.unet.parameters())
methods: T2I-Adapter | 61_adapter | What does an adapter add? | code | zip(features, added(adapter, 900, 1.))
methods: InstructPix2Pix | 62_instruct | What are two guidances? | code | def guided(nothing, picture, both, image_scale, text_scale)
methods: unconditional generation | 65_unconditional | Does it draw? | code | short = train_unconditional(
methods: textual inversion | 68_textual_inversion | How is it trained? | code | result = train_textual_inversion(ask(), inverted, log=quietly)
methods: Custom Diffusion, keys and values | 66_custom_diffusion | Where do words enter? | code | kv = sum(p.numel() for name, p in unet.named_parameters()
methods: Custom Diffusion, retrieved pictures | 66_custom_diffusion | Which pictures of the class? | text | Custom Diffusion takes real pictures
methods: DDPO, a reward | 64_ddpo | What becomes likelier? | code | gain = advantages(-sizes)
methods: DDPO, a chain of choices | 64_ddpo | Where is there a choice? | code | mean, std = next_latents(schedule, answer, xt, times[4:5], times[5:6])
methods: latent consistency distillation | 63_lcm | What would a better answer be? | code | skip, out = consistency_scalings(t)
methods: which one to take | 05_methods | Which one? | code | def choice(way)
diffusers: pipelines | 17_diffusers | One: the pipeline | text | One: the pipeline
diffusers: models | 17_diffusers | Two: the models | text | Two: the models
diffusers: noise schedulers | 17_diffusers | Three: the scheduler | text | Three: the scheduler
diffusers: discrete and continuous timesteps | 17_diffusers | Three: the scheduler | code | is_floating_point
diffusers: speed against quality | 50_inference | Which sampler? | code | names, few = ("euler", "euler_a", "ddim", "unipc", "dpmpp_2m_karras"), 4
diffusers: another scheduler | 17_diffusers | Another scheduler | text | a scheduler is made from another's configuration
diffusers: piece by piece | 17_diffusers | The same picture, piece by piece | code | latents = scheduler.step(without + guidance*(with_words - without), t, latents).prev_sample
diffusers: training scripts | 80_arguments | The first command, line by line | text | It is read by our parser, not run: the data set and SDXL 1.0 are on the hub.
arguments: the table of the text-to-image script | 80_arguments | All of them | code | argument_table(known.values())
arguments: what is new in the DreamBooth script | 80_arguments | What does the document say wrongly? | code | other defaults in DreamBooth
arguments: what the DreamBooth script is said to lack | 80_arguments | What does the document say wrongly? | code | removed = (
arguments: errors of the tables | 80_arguments | What does the document say wrongly? | code | corrected = [one for one in known.values() if one.document]
arguments: schedules of the learning rate | 31_step | How fast should it learn? | code | for name in ("linear", "cosine", "polynomial", "constant", "constant_with_warmup")
arguments: min-SNR | 30_objective | Is there a weight without a cap to choose? | code | label="min-SNR, gamma 5"
examples: the text-to-image command | 80_arguments | The first command, line by line | code | AdamLucek/oldbookillustrations-small
examples: its breakdown | 80_arguments | The first command, line by line | code | breakdown(old_books)
examples: the DreamBooth command | 80_arguments | The second command, line by line | code | AdamLucek/green-chair
examples: its breakdown, too | 80_arguments | The second command, line by line | code | breakdown(green_chair)
set-up: providers for one person | 81_cloud | Whose GPU? | text | [Runpod](https://www.runpod.io), [Lambda](https://lambda.ai), [Vast](https://vast.ai), [TensorDock](https://www.tensordock.com), [Hyperstack]
set-up: providers for teams and clouds | 81_cloud | Whose GPU? | text | [CoreWeave](https://www.coreweave.com)
set-up: which GPU | 81_cloud | How much memory does it take? | text | | memory of the card |
set-up: options that save memory | 81_cloud | How much memory does it take? | code | saving = ("gradient_checkpointing"
set-up: step 1, connect | 81_cloud | The five steps | text | Open a terminal
set-up: step 2, install | 81_cloud | The five steps | text | pip install sdxl_course
set-up: step 3, log in | 81_cloud | The five steps | text | hf auth login
set-up: step 4, accelerate | 81_cloud | The five steps | text | accelerate config default
set-up: step 5, run | 81_cloud | The five steps | text | with `accelerate launch -m sdxl_course.text_to_image` in front or simply
set-up: how to tune | 80_arguments | Which five matter? | text | A rate three times as high and one three times as low tell more than ten other options.
set-up: load and use it | 50_inference | How do we load LoRAs and set their strength? | code | styled = load_pipeline("tiny", lora=files["blueprint"].parent
arguments: a VAE that is safe in fp16 | 22_cache | In which number format? | code | print("force_upcast"
"""
ROWS = [tuple(part.strip() for part in line.split(" | ", 4)) for line in COVERED.strip().split("\n")]
KINDS = dict(code="code", text="markdown")
LESSONS = [path for path in NOTEBOOKS if kind(page_name(path)) == "lesson"]
TOO_COMMON = 2 # pages; words that stand on more say nothing about one of them


def plain(text):
    "Words without regard to lines and capitals."
    return re.sub(r"\s+", " ", text).lower()


def sections(cells):
    "Each cell with the section that it stands in; a cell with a heading belongs to what it opens."
    title = "-"
    for cell in cells:
        if cell.cell_type == "markdown": title = (re.findall(r"^## (.+)$", cell.source, re.M) or [title])[-1].strip()
        yield title, cell


def wrong(cells, section, sort, words):
    "What is wrong with a row, in a sentence; None if its cell is where it should be, and runs."
    holders = [(title, cell) for title, cell in sections(cells) if cell.cell_type == KINDS[sort] and plain(words) in plain(cell.source)]
    if len(holders) != 1: return f"{len(holders)} cells of {sort} say {words!r}, it must be one"
    (title, cell), = holders
    if title != section: return f"{words!r} stands in the section {title!r}, wanted {section!r}"
    if sort == "code" and (is_skipped(cell) or holds_imports(cell) or not lines_of(cell)): return f"the cell with {words!r} is not run, or does nothing"


@pytest.mark.parametrize("item, page, section, sort, words", ROWS, ids=[row[0] for row in ROWS])
def test_what_was_promised_has_its_place(item, page, section, sort, words):
    path = NBS / f"{page}.ipynb"
    assert path.exists(), f"{item}: there is no page {page}"
    fault = wrong(read(path).cells, section, sort, words)
    assert fault is None, f"{item}, page {page}: {fault}"


def test_every_row_is_another_item():
    assert all(len(row) == 5 for row in ROWS)
    for of in (lambda row: row[0], lambda row: row[1:]): assert len({of(row) for row in ROWS}) == len(ROWS)


def test_words_stand_on_one_page_or_two():
    text = {page_name(path): [plain(cell.source) for cell in read(path).cells] for path in LESSONS}
    common = {words: count for _, _, _, _, words in ROWS if (count := sum(any(plain(words) in one for one in cells) for cells in text.values())) > TOO_COMMON}
    assert not common, f"these words stand on many pages, and would be found wherever they are lost: {common}"


@pytest.mark.parametrize("how", ("deleted", "moved", "flagged"))
def test_a_row_notices_what_becomes_of_its_cell(how):
    for item, page, section, sort, words in ROWS:
        cells = read(NBS / f"{page}.ipynb").cells
        at = next(k for k, cell in enumerate(cells) if cell.cell_type == KINDS[sort] and plain(words) in plain(cell.source))
        others = [*cells[:at], *cells[at + 1:]]
        if how == "moved": others.append(SimpleNamespace(**cells[at] | dict(source=re.sub(r"^## ", "", cells[at].source, flags=re.M))))
        if how == "flagged":
            if sort == "text": continue
            others.insert(at, SimpleNamespace(**cells[at] | dict(source=f"#| gpu\n{cells[at].source}")))
        assert wrong(others, section, sort, words), f"{item}: nobody would notice that its cell was {how}"


def test_every_step_of_the_drawing_leads_to_a_cell_that_does_it():
    cells, found = read(NBS / "04_seven_steps.ipynb").cells, {}
    exec(next(cell.source for cell in cells if cell.source.startswith("#| code-fold") and "def drawing" in cell.source), found)
    steps = [box[0] for box in found["BOXES"]]
    assert steps == ["1", "2a", "2b", "2c", "3", *(f"4{letter}" for letter in "abcdefg"), "5", "6", "7"]
    assert re.findall(r'href="#step-(\w+)"', found["drawing"]()) == steps
    for step in steps:
        (at,) = [k for k, cell in enumerate(cells) if f'<a id="step-{step}"></a>' in cell.source]
        assert cells[at + 1].cell_type == "code" and not is_skipped(cells[at + 1]), f"no cell does step {step}"


def test_the_picture_of_the_parts_has_them_all():
    drawn = re.findall(r"<text[^>]*>([^<]+)</text>", (NBS / "images/10_box.svg").read_text(encoding="utf-8"))
    assert {"text_encoder", "text_encoder_2", "unet", "scheduler", "refiner", "vae"} <= set(drawn)
    text = " ".join(drawn)
    assert "denoising_end" in text and "denoising_start" in text
