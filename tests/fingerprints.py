"""sha256 of every file that a set of small training runs leaves, to prove that a change of the code changes no result.

    python tests/fingerprints.py --save before.json        at the old commit
    python tests/fingerprints.py --compare before.json     at the new one, on the same machine
    python tests/fingerprints.py --only plain ...          some of the runs

Runs use a model with a few thousand random weights. JSON and YAML files are compared by content, not by the order of their keys."""
import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", OMP_NUM_THREADS="1") # the number of threads changes the order of sums
sys.path.insert(0, str(Path(__file__).resolve().parent))

COMMON = ["--pretrained_model_name_or_path", "model", "--resolution", "64", "--train_batch_size", "2", "--max_train_steps", "4", "--checkpointing_steps", "2",
          "--learning_rate", "1e-2", "--seed", "0", "--report_to", "none", "--num_validation_images", "1"]
STYLE = ["--train_data_dir", "pictures"]
SUBJECT = ["--instance_data_dir", "square", "--instance_prompt", "a photo of TOK chair", "--max_grad_norm", "0.5"]
PRIOR = ["--class_prompt", "a photo of a chair"]

RUNS = { # name -> (module, flags)
    "plain": ("text_to_image", [*STYLE, "--random_flip", "--noise_offset", "0.05", "--snr_gamma", "5", "--validation_prompt", "a chair", "--output_kohya_format",
                                "--proportion_empty_prompts", "0.3", "--gradient_accumulation_steps", "2"]),
    "buckets": ("text_to_image", [*STYLE, "--use_aspect_ratio_buckets", "--random_flip", "--debiased_estimation_loss", "--validation_split", "0.3"]),
    "text_encoders": ("text_to_image", [*STYLE, "--train_text_encoder", "--text_encoder_lr", "1e-3", "--lora_dropout", "0.1", "--loraplus_lr_ratio", "4"]),
    "prodigy": ("text_to_image", [*STYLE, "--optimizer", "prodigy", "--learning_rate", "1", "--cached_crops", "2", "--lora_layers", "attention+feedforward+convolution"]),
    "ema": ("text_to_image", [*STYLE, "--use_ema", "--ema_decay", "0.9", "--center_crop", "--timestep_bias_strategy", "later", "--lr_scheduler", "cosine", "--lr_warmup_steps", "1"]),
    "zero_snr": ("text_to_image", [*STYLE, "--prediction_type", "v_prediction", "--rescale_betas_zero_snr", "--snr_gamma", "5", "--use_dora", "--shuffle_tags", "--skip_final_inference"]),
    "masked": ("text_to_image", [*STYLE, "--masked_loss", "--mask_data_dir", "masks", "--unmasked_weight", "0.2", "--random_flip", "--init_lora_weights", "pissa", "--optimizer", "schedulefree"]),
    "prior": ("dreambooth", [*SUBJECT, *PRIOR, "--with_prior_preservation", "--class_data_dir", "class", "--num_class_images", "3", "--random_flip"]),
    "teacher": ("dreambooth", [*SUBJECT, *PRIOR, "--prior_teacher", "--snr_gamma", "5", "--train_text_encoder"]),
    "words": ("dreambooth", [*SUBJECT, "--train_text_encoder_ti", "--ti_lr", "1e-2", "--train_text_encoder_ti_frac", "0.5", "--optimizer", "AdamW"]),
    "edm_style": ("dreambooth", [*SUBJECT, *PRIOR, "--do_edm_style_training", "--prior_teacher", "--repeats", "2"]),
    "edm_model": ("dreambooth", [*SUBJECT, *PRIOR, "--pretrained_model_name_or_path", "edm", "--prior_teacher", "--num_validation_images", "1", "--validation_prompt", "a chair"]),
    "resumed": ("text_to_image", None), # `plain` again, from its checkpoint-2
}


TELL = ("README.md", "pytorch_lora_weights_kohya.safetensors", "config.yaml", "checkpoint-4/trainer_state.json") # these hold the run's own name and flags


def prepare():
    "Models, pictures and masks, in the folder that we stand in."
    import shutil
    from PIL import Image
    from toy import make_pictures, make_toy_model
    make_toy_model(Path("model"))
    shutil.copytree("model", "edm")
    scheduler = dict(_class_name="EDMEulerScheduler", sigma_data=0.5, num_train_timesteps=1000, prediction_type="epsilon", sigma_max=80.0, sigma_min=0.002, sigma_schedule="karras", rho=7.0)
    Path("edm/scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    index = json.loads(Path("edm/model_index.json").read_text())
    Path("edm/model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "EDMEulerScheduler"]}))
    make_pictures(Path("square"), 3)
    make_pictures(Path("pictures"), 6, size=(96, 72), captions=[f"a, picture, {i}" for i in range(6)])
    Path("masks").mkdir()
    for i in range(6): Image.linear_gradient("L").rotate(60*i).resize((72, 96)).save(f"masks/{i}.png")


def given(value):
    "Without options that are off, so that a new option changes nothing."
    if isinstance(value, dict): return {key: given(one) for key, one in value.items() if one is not None and one is not False}
    return [given(one) for one in value] if isinstance(value, list) else value


def content(path):
    "The bytes that count."
    data = path.read_bytes()
    if path.suffix == ".json": return json.dumps(given(json.loads(data)), sort_keys=True).encode()
    if path.suffix == ".jsonl": return "\n".join(json.dumps(json.loads(line), sort_keys=True) for line in data.decode().splitlines()).encode()
    if path.name == "config.yaml":
        import yaml
        return json.dumps(given(yaml.safe_load(data)), sort_keys=True).encode()
    return data


def fingerprint(folder):
    "File name -> sha256; what names processes or plots the curve does not count, nor do manifests, which name the others."
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name not in ("manifest.json", ".lock", "loss.png")]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(content(path)).hexdigest() for path in files}


def run(name):
    "One run in the folder that we stand in."
    module, flags = RUNS[name]
    if flags is None: flags = RUNS["plain"][1] + ["--resume_from_checkpoint", "plain/checkpoint-2"]
    words = [*COMMON, *flags, "--output_dir", name]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said): code = importlib.import_module(f"sdxl_course.{module}").main(words)
    if code: sys.exit(f"{name} ended with {code}: {said.getvalue()[-2000:]}")
    return fingerprint(name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save")
    parser.add_argument("--compare")
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS))
    words = parser.parse_args()
    before = json.loads(Path(words.compare).read_text()) if words.compare else {}
    target, found, wrong = words.save and Path(words.save).resolve(), {}, []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare()
        for name in dict.fromkeys((["plain"] if "resumed" in words.only else []) + words.only):
            found[name] = run(name)
            if words.compare:
                changed = sorted(file for file in found[name].keys() | before[name].keys() if found[name].get(file) != before[name].get(file))
                print(f"{name:<14} {len(found[name])} files, {len(changed)} changed {' '.join(changed[:12])}", flush=True)
                wrong += changed
            else: print(f"{name:<14} {len(found[name])} files", flush=True)
        same = found.get("resumed") and [f for f in found["plain"] if f in found["resumed"] and f not in TELL and not f.startswith("checkpoint-2/") and found["plain"][f] != found["resumed"][f]]
        if same: print("the resumed run differs from the straight one:", *same)
        os.chdir("/")
    if target: target.write_text(json.dumps(found, indent=1))
    return bool(wrong)


if __name__ == "__main__": sys.exit(main())
