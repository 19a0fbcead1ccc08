#!/bin/bash
# From nothing to exported weights of sdxl-tiny on one GPU, without a refiner, in about ten minutes, and then its scores.
#
#   bash tests/gpu/pretrain.sh [--vae 1.5] [--clip 0.4] [--unet 3.5] [--scenes 8000] [--out FOLDER] [--precision bf16]
#       minutes of training: of the autoencoder, of each CLIP, of the UNet. Each first makes PROBE updates to learn how long one
#       takes, then as many as fit, with a schedule of that length.
#   bash tests/gpu/pretrain.sh --begin unet [...]
#       goes on in a folder that holds pictures, CLIPs, the autoencoder and cached latents
#   STEPS=20 bash tests/gpu/pretrain.sh
#       a try on any machine: so many updates of every stage, a few scenes, a few pictures to judge
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TQDM_DISABLE=1

VAE=1.5 CLIP=0.4 UNET=3.5 BEGIN=data SCENES=8000 OUT=${OUT:-pretrain-run} PRECISION=bf16
while [ $# -gt 0 ]; do
    case $1 in
        --vae) VAE=$2 ;; --clip) CLIP=$2 ;; --unet) UNET=$2 ;; --begin) BEGIN=$2 ;; --scenes) SCENES=$2 ;; --out) OUT=$2 ;; --precision) PRECISION=$2 ;;
        *) echo "unknown flag $1" >&2; exit 2 ;;
    esac
    shift 2
done
case $BEGIN in data|unet) ;; *) echo "--begin $BEGIN: wanted data or unet" >&2; exit 2 ;; esac

PROBE=40 STEPS=${STEPS:-} JUDGES=600 INSTANCES=300
SIZES="--shard_size 100 --num_validation 48 --num_things 160 --num_subjects 100 --log_every 200
    --vae_batch_size 64 --clip_batch_size 512 --unet_batch_size 128 --judge_batch_size 128"
ASKED="--num_prompts 200 --num_held_out 100 --batch_size 50"
if [ -n "$STEPS" ]; then
    SCENES=24 PRECISION=no PROBE=2 JUDGES=$STEPS INSTANCES=$STEPS
    SIZES="--shard_size 8 --num_validation 2 --num_things 6 --num_subjects 4 --log_every 10
        --vae_batch_size 4 --clip_batch_size 16 --unet_batch_size 4 --judge_batch_size 8"
    ASKED="--num_prompts 4 --num_held_out 2 --num_inference_steps 4 --batch_size 3"
fi

pretrain() { # stages, further flags
    python -m sdxl_course.pretraining.export --output_dir "$OUT" --mixed_precision "$PRECISION" --num_scenes "$SCENES" \
        --num_workers "$(nproc)" --sample_every 0 $SIZES \
        --judge_steps "$JUDGES" --instance_steps "$INSTANCES" \
        --stage "$@"
}

probe() { echo "--$1_steps $PROBE --$1_schedule_steps 1000000"; } # stage

fit() { # stage, folder of its log, minutes, how much dearer updates become: the flag for as many updates as fit
    echo "--$1_steps ${STEPS:-$(python - "$OUT/$2/training_log.jsonl" "$3" "$4" <<'PYTHON'
import json, sys
seconds = [json.loads(line)["seconds"] for line in open(sys.argv[1])][:40]
half = len(seconds)//2 # the first ones warm up
each = max((seconds[-1] - seconds[half])/(len(seconds) - 1 - half), 1e-3)
print(max(len(seconds), int(60*float(sys.argv[2])/(each*float(sys.argv[3])))))
PYTHON
)}"
}

began=$SECONDS
if [ "$BEGIN" = data ]; then
    pretrain data,tokenizer,vae $(probe vae)
    pretrain vae,judges,clip $(fit vae vae "$VAE" 1.2) $(probe clip)
    pretrain clip,cache,unet $(fit clip clip_2 "$CLIP" 1) $(probe unet)
else
    pretrain unet $(probe unet)
fi
pretrain unet,export $(fit unet unet "$UNET" 1)
echo "trained and exported in $((SECONDS - began)) seconds: $OUT/export"
python -m sdxl_course.evaluate --model "$OUT/export" $ASKED --output "$OUT/evaluation.json" --grid "$OUT/samples.png"
