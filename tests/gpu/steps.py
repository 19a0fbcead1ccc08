"""Seconds and peak memory of a LoRA step on SDXL 1.0's architecture with random weights: this trainer's against a plain one.

    python tests/gpu/steps.py --json steps.json                        on a GPU: every case, a process each, some 8 minutes
    python tests/gpu/steps.py --cases "plain bf16" "ours bf16"         these alone
    python tests/gpu/steps.py --toy --pairs 2                          a try on any machine: sdxl-tiny's sizes

It needs a torch for the GPU, this repository and what it installs, and no weights: these are drawn at random. `plain` is a step as the
reference scripts write it (PEFT's LoRA, autocast, AdamW over a loop of its own). Cases that need a package which is not there say so:
bitsandbytes for 8-bit Adam and nf4, torchao for int8. Wheels: bitsandbytes>=0.45, torchao>=0.16.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CASES = {  # name -> what differs from a step of this trainer in bf16
    "plain bf16": dict(plain=True), "ours bf16": {},
    "plain fp16": dict(plain=True, precision="fp16"), "ours fp16": dict(precision="fp16"),
    "plain bf16, checkpointing": dict(plain=True, checkpointing=True), "ours bf16, checkpointing": dict(checkpointing=True),
    "plain bf16, compiled blocks": dict(plain=True, compiled=True), "ours bf16, compiled blocks": dict(compiled=True),
    "ours bf16, 8-bit Adam": dict(eight_bit=True, needs="bitsandbytes"),
    "ours bf16, nf4 base": dict(base="nf4", needs="bitsandbytes"), "ours bf16, int8 base": dict(base="int8", needs="torchao")}


def quantize(network, base):
    "The frozen matrices in four or eight bits."
    import torch
    if base == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
        quantize_(network, Int8WeightOnlyConfig())
        return
    import bitsandbytes as bnb
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not torch.nn.Linear: continue
            small = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, layer.weight.dtype, quant_type="nf4", device="meta")
            small.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            if layer.bias is not None: small.bias = layer.bias
            setattr(parent, name, small.to(layer.weight.device))


def model(toy, device, dtype):
    "SDXL's or sdxl-tiny's shapes; the UNet has random weights, all else has none."
    import torch
    from sdxl_course.memory import meta_components
    components = meta_components("tiny" if toy else "stabilityai/stable-diffusion-xl-base-1.0")
    components.unet = components.unet.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    for tensor in components.unet.parameters(): torch.nn.init.normal_(tensor, std=0.02)
    return components


def plain_step(components, rank, case):
    "(module of a batch, parameters) as a script writes it with PEFT and diffusers alone."
    import torch
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig
    unet = components.unet
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    cast_training_params(unet, torch.float32)
    if case.get("checkpointing"): unet.enable_gradient_checkpointing()
    alphas = components.scheduler.alphas_cumprod.to(unet.device)

    def loss(batch, noise, timesteps):
        kept = alphas[timesteps][:, None, None, None]
        noisy = kept.sqrt()*batch.latents + (1 - kept).sqrt()*noise
        added = dict(text_embeds=batch.pooled_prompt_embeds, time_ids=batch.time_ids)
        answer = unet(noisy, timesteps, batch.prompt_embeds, added_cond_kwargs=added).sample
        return torch.nn.functional.mse_loss(answer.float(), noise.float())
    return loss, [p for p in unet.parameters() if p.requires_grad]


def our_step(components, config):
    "The same of this trainer."
    from sdxl_course.text_to_image import TEXT_TO_IMAGE as method
    trained = method.weights(config, components, 0)
    loss = method.loss(config, components, method.schedule(config, components.scheduler), False).to(components.unet.device).train()
    return lambda *given: loss(*given).mean(), list(trained.named.values())


def measure(case, toy, batch_size, steps):
    "Seconds of a step, and bytes that its largest moment took."
    import resource

    import torch
    from sdxl_course.core import seeded
    from sdxl_course.devices import pick_device
    from sdxl_course.memory import fake_batch
    from sdxl_course.options import parse_config
    from sdxl_course.text_to_image import TextToImageConfig
    from sdxl_course.train.optimizer import make_optimizer
    device, precision = pick_device(), case.get("precision", "bf16")
    half, side = dict(bf16=torch.bfloat16, fp16=torch.float16)[precision], 128 if toy else 1024
    words = ["--pretrained_model_name_or_path", "tiny", "--train_data_dir", "none", "--resolution", str(side), "--rank", "8", "--mixed_precision", precision]
    config = parse_config(TextToImageConfig, words + ["--gradient_checkpointing"]*bool(case.get("checkpointing")))
    components = model(toy, device, half)
    components.unet.requires_grad_(False).train()
    if case.get("base"): quantize(components.unet, case["base"])
    loss, parameters = plain_step(components, config.rank, case) if case.get("plain") else our_step(components, config)
    if case.get("compiled"): components.unet.compile_repeated_blocks()
    optimizer = make_optimizer(parameters, 1e-4, name="adamw8bit" if case.get("eight_bit") else "adamw") if not case.get("plain") else torch.optim.AdamW(parameters, 1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    with torch.device(device): batch, noise, _ = fake_batch(components, batch_size, side, dtype=half)
    for tensor in (batch.latents, batch.prompt_embeds, batch.pooled_prompt_embeds, noise): tensor.normal_()
    batch.time_ids.fill_(float(side))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times, first = [], None
    for step in range(steps + 3):
        if step == 3 and device.type == "cuda": torch.cuda.reset_peak_memory_stats()
        wait()
        begin = time.perf_counter()
        t = torch.randint(0, 1000, (batch_size,), generator=seeded("step", step)).to(device)
        with torch.autocast(device.type, half): value = loss(batch, noise, t)
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer), scaler.update(), optimizer.zero_grad()
        wait()
        times.append(time.perf_counter() - begin)
        first = first if first is not None else float(value.detach())
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
    return dict(seconds=statistics.median(times[3:]), first_step=times[0], peak=peak, loss=first, trained=sum(p.numel() for p in parameters))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="CASE")
    parser.add_argument("--toy", action="store_true", help="sdxl-tiny's sizes at 128 pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=10, help="steps that are timed, after three that warm up")
    parser.add_argument("--limit", type=int, default=150, help="seconds for one case")
    parser.add_argument("--json", help="file for the numbers; written again after every case")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    words = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if words.one:
        print(json.dumps(measure(CASES[words.one], words.toy, words.batch, words.pairs)))
        return
    from sdxl_course.devices import provenance
    rows = []
    print("| step | seconds | peak, GiB | first step, s |\n|---|---|---|---|")
    for name in words.cases:
        needs = CASES[name].get("needs")
        if needs and not find_spec(needs): row = dict(left_out=f"needs {needs}")
        else:
            command = [sys.executable, __file__, "--one", name, "--batch", str(words.batch), "--pairs", str(words.pairs), *["--toy"]*words.toy]
            try: done = subprocess.run(command, capture_output=True, text=True, timeout=words.limit)
            except subprocess.TimeoutExpired: row = dict(left_out=f"took longer than {words.limit} s")
            else: row = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else dict(left_out=(done.stderr.strip().splitlines() or ["died"])[-1][:200])
        rows.append(dict(case=name, **row))
        print(f"| {name} | {row['left_out']} | | |" if "left_out" in row else f"| {name} | {row['seconds']:.3f} | {row['peak']/2**30:.2f} | {row['first_step']:.1f} |", flush=True)
        if words.json: Path(words.json).write_text(json.dumps(dict(provenance=provenance(), toy=words.toy, batch=words.batch, steps=words.pairs, rows=rows), indent=1))


if __name__ == "__main__": main()
