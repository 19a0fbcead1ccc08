"""What the document promised, and where the course keeps it: one row for each section, concept, table, example, method and result.

A row names a page and words that stand in one of its cells, prose or code. It fails when they are gone; that the cells run is another test's
matter, which runs every page."""
import re

import pytest

from course import NBS, read

COVERED = """
results: old book illustrations, the style | 40_text_to_image | old book illustration
results: my green chair, the object | 41_dreambooth | sks chair
results: old book illustrations, the four prompts | 42_result_old_book | DOCUMENT = ("A dachshund walks confidently down a dirt path", "A sailboat sailing the ocean", "A diagram of a wolf skeleton", "A carnival in the distance")
results: old book illustrations, before and after | 42_result_old_book | for when in ("wanted", "before", "after")
results: old book illustrations, its data set | 42_result_old_book | huggingface.co/datasets/AdamLucek/oldbookillustrations-small
results: old book illustrations, its model | 42_result_old_book | huggingface.co/AdamLucek/sdxl-base-1.0-oldbookillustrations-lora
results: old book illustrations, its notebook | 42_result_old_book | SDXL LoRA OldBookIllustrations.ipynb
results: old book illustrations, how long it took | 42_result_old_book | three and a half hours
results: the green chair, its four prompts | 43_result_green_chair | DOCUMENT = ("in front of the great pyramids"
results: the green chair, its reference | 43_result_green_chair | show_images(learnt, places
results: the green chair, its data set | 43_result_green_chair | huggingface.co/datasets/AdamLucek/green-chair
results: the green chair, its model | 43_result_green_chair | huggingface.co/AdamLucek/sdxl-base-1.0-greenchair-dreambooth-lora
results: the green chair, its notebook | 43_result_green_chair | SDXL LoRA DreamBooth GreenChair.ipynb
architecture: positive and negative prompt | 50_inference | negative prompt
architecture: two text encoders | 10_components | text_encoder_2
architecture: embeddings are joined | 11_conditioning | penultimate
architecture: seed and noise | 01_draw | seed
architecture: the UNet, down and up again | 10_components | UNet
architecture: its transformers | 10_components | transformer
architecture: the scheduler | 17_diffusers | scheduler
architecture: VAE decoder | 10_components | VAE
methodology: seven steps in one figure | 04_seven_steps | HTML(drawing())
methodology: 1, load a trained model | 04_seven_steps | load_components("tiny")
methodology: 2, resize, crop and flip | 04_seven_steps | prepare_image
methodology: 2, encode text | 04_seven_steps | encode_prompts
methodology: 2, encode pictures | 04_seven_steps | posterior(model.vae
methodology: 2, encode before training | 22_cache | Why encode twice?
methodology: 3, hyperparameters | 04_seven_steps | learning_rate, batch_size, updates
methodology: 4a, sample noise | 04_seven_steps | step-4a
methodology: 4b, sample a timestep | 04_seven_steps | step-4b
methodology: 4c, add the noise | 04_seven_steps | step-4c
methodology: 4d, predict the noise | 04_seven_steps | step-4d
methodology: 4e, the loss | 04_seven_steps | step-4e
methodology: 4f, backpropagate | 04_seven_steps | step-4f
methodology: 4g, repeat and validate | 04_seven_steps | step-4g
LoRA: overfitting | 57_overfitting | learns its pictures by heart
LoRA: catastrophic forgetting | 57_overfitting | Catastrophic forgetting
LoRA: against full fine-tuning | 57_overfitting | for way in ("lora", "full")
LoRA: frozen weights | 15_lora | never moves
LoRA: injectable modules | 15_lora | inject_adapter_in_model
LoRA: low-rank update matrices | 15_lora | rank
LoRA: fewer trained parameters | 04_seven_steps | parameters learn
LoRA: less memory | 81_cloud | to train
LoRA: the projections of attention | 80_arguments | attention
LoRA: the other layers may learn as well | 80_arguments | attention+feedforward+convolution
DreamBooth: a rare word and its class | 41_dreambooth | sks chair
DreamBooth: key concept 1, the unique identifier | 43_result_green_chair | Idea one: a unique identifier
DreamBooth: key concept 2, the language-vision dictionary | 43_result_green_chair | Idea two: a language-vision dictionary
DreamBooth: key concept 3, class-specific prior preservation | 43_result_green_chair | Idea three: class-specific prior preservation
DreamBooth: language drift | 43_result_green_chair | language drift
DreamBooth: prior preservation | 41_dreambooth | prior
DreamBooth: the loss of prior preservation | 30_objective | prior_preservation
DreamBooth: applications, measured | 52_study | What did it learn
diffusers: pipelines | 17_diffusers | One: the pipeline
diffusers: models | 17_diffusers | Two: the models
diffusers: noise schedulers | 17_diffusers | Three: the scheduler
diffusers: discrete and continuous timesteps | 17_diffusers | is_floating_point
diffusers: piece by piece | 17_diffusers | piece by piece
diffusers: training scripts | 80_arguments | the document's command
arguments: the table of the text-to-image script | 80_arguments | argument_table(known.values())
arguments: what is new in the DreamBooth script | 80_arguments | other defaults in DreamBooth
arguments: what the DreamBooth script is said to lack | 80_arguments | removed = (
arguments: errors of the tables | 80_arguments | What does the document say wrongly?
examples: the text-to-image command | 80_arguments | AdamLucek/oldbookillustrations-small
examples: its breakdown | 80_arguments | breakdown(old_books)
examples: the DreamBooth command | 80_arguments | AdamLucek/green-chair
examples: its breakdown, too | 80_arguments | breakdown(green_chair)
set-up: providers for one person | 81_cloud | Runpod
set-up: providers for teams and clouds | 81_cloud | CoreWeave
set-up: which GPU | 81_cloud | memory of the card
set-up: options that save memory | 81_cloud | gradient_checkpointing
set-up: step 1, connect | 81_cloud | Open a terminal
set-up: step 2, install | 81_cloud | pip install sdxl_course
set-up: step 3, log in | 81_cloud | hf auth login
set-up: step 4, accelerate | 81_cloud | accelerate config default
set-up: step 5, run | 81_cloud | accelerate launch -m sdxl_course.text_to_image
set-up: load and use it | 50_inference | load_pipeline
methods: ControlNet | 60_controlnet | zero convolution
methods: T2I-Adapter | 61_adapter | what does an adapter add
methods: InstructPix2Pix | 62_instruct | what are two guidances
methods: unconditional generation | 65_unconditional | what does it draw without words
methods: full fine-tuning | 67_full | what does it learn, and what does it forget
methods: textual inversion | 68_textual_inversion | where does a word live
methods: Custom Diffusion | 66_custom_diffusion | keys and values
methods: DDPO | 64_ddpo | reward
methods: latent consistency distillation | 63_lcm | consistency function
methods: which one to take | 05_methods | which one?
"""
ROWS = [tuple(part.strip() for part in line.split(" | ", 2)) for line in COVERED.strip().split("\n")]


@pytest.mark.parametrize("item, page, words", ROWS, ids=[row[0] for row in ROWS])
def test_what_was_promised_has_its_place(item, page, words):
    path = NBS / f"{page}.ipynb"
    assert path.exists(), f"{item}: there is no page {page}"
    plain = lambda text: re.sub(r"\s+", " ", text).lower()
    assert any(plain(words) in plain(cell.source) for cell in read(path).cells), f"{item}: no cell of {page} says {words!r}"


def test_every_row_is_another_item():
    assert len({row[0] for row in ROWS}) == len(ROWS) and all(len(row) == 3 for row in ROWS)
