"""Semantica's baselines: image variations by published pipelines of diffusers, in files that 01 and 06 score like ours.

Reads   --conditions, which images of DATA are varied: conditions.npy of 05, or any array [n] of indices
        DATA of 01: names.npy and the source images, in the folder `source` of data.json; images.npy if that is gone
Writes  into --out: samples.npy [n, k, S, S, 3] uint8, conditions.npy, samples.json, as 05 does

The pipeline sees the central square of a source image and draws at its own size; LANCZOS makes S px of what it draws.
Image (i, j) depends on (seed, i, j) only. Guidance s is that of diffusers, (1 - s) uncond + s cond: s is 1 + w of 05,
and samples.json has w. IP-Adapter gets an empty prompt.

The published weights were NOT run here, only tiny random networks. Calibrate first, on Semantica's ImageNet one-shot
(docs/protocols.md): its FIDs are 34.5 for SD image variations (s = 6; s = 4 gives 30.8) and 20.2 for IP-Adapter (s = 4,
scale 1). Versatile Diffusion, its third baseline (26.3), is left out.

    pip install diffusers==0.39.0 -r requirements-encoders.txt
    python -m examples.external --data D --conditions c.npy --out D/samples/sd --guidance-scale 6 \\
        --pipeline lambdalabs/sd-image-variations-diffusers --revision v2.0
    python -m examples.external --data D --conditions c.npy --out D/samples/ip --guidance-scale 4 \\
        --pipeline stable-diffusion-v1-5/stable-diffusion-v1-5 --ip-adapter h94/IP-Adapter
    python 01_embed.py --data D --images D/samples/ip/samples.npy --out D/samples/ip --cls-only         # for 06
    torchrun --nproc-per-node=8 -m examples.external ...                                                # eight GPUs
"""
import json
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import common


def encoder_input(image, pipe):
    """[1, 3, px, px] for SD image variations: bicubic *without* antialiasing, as its model card asks for."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    x = torch.nn.functional.interpolate(x, [pipe.image_encoder.config.image_size] * 2, mode="bicubic", antialias=False)
    only_normalise = dict(do_resize=False, do_center_crop=False, do_rescale=False)
    return pipe.feature_extractor(x, return_tensors="pt", **only_normalise).pixel_values


p = common.parser(__doc__)
p.add_argument("--conditions", type=Path, required=True, help="array [n] of indices into DATA")
p.add_argument("--out", type=Path, required=True, help="folder to write")
p.add_argument("--pipeline", required=True, help="folder or name of the pipeline")
p.add_argument("--revision", help="of that name")
p.add_argument("--ip-adapter", help="folder or name of the adapter; the pipeline is Stable Diffusion 1.5 then")
p.add_argument("--scale", type=common.share, default=1.0, help="of the adapter (%(default)s)")
p.add_argument("--variations", type=common.count, default=10, help="k, samples of each condition (%(default)s)")
p.add_argument("--guidance-scale", type=common.positive, default=4.0, help="s; 1 is no guidance (%(default)s)")
args = common.parse(p)
device, rank, world = common.start(args.device)
if (args.out / "samples.npy").exists():
    common.die(f"{args.out} holds samples already; give another --out")

kind = diffusers.StableDiffusionPipeline if args.ip_adapter else diffusers.StableDiffusionImageVariationPipeline
# without the safety checker, which would blacken some samples
pipe = kind.from_pretrained(args.pipeline, revision=args.revision, safety_checker=None, requires_safety_checker=False)
if args.ip_adapter:
    pipe.load_ip_adapter(args.ip_adapter, "models", "ip-adapter_sd15.safetensors")
    pipe.set_ip_adapter_scale(args.scale)
pipe.to(device).set_progress_bar_config(disable=True)

names, images = (common.load(args.data / f"{name}.npy") for name in ("names", "images"))
source, conditions = Path(common.load(args.data / "data.json")["source"]), common.load(args.conditions)
shape = (len(conditions), args.variations, *images.shape[1:])
with common.writing_array(args.out / "samples.npy", shape, np.uint8) as samples:
    for i in tqdm(range(rank, len(conditions), world), args.out.name, disable=True if rank else None):
        image = Image.open(source / names[conditions[i]]) if source.is_dir() else Image.fromarray(images[conditions[i]])
        image = ImageOps.exif_transpose(image).convert("RGB")
        image = ImageOps.fit(image, [min(image.size)] * 2)              # the central square
        shown = dict(prompt="", ip_adapter_image=image) if args.ip_adapter else dict(image=encoder_input(image, pipe))
        generators = [common.generator(device, args.seed, i, j, 1) for j in range(args.variations)]
        drawn = pipe(**shown, num_images_per_prompt=args.variations, guidance_scale=args.guidance_scale,
                     generator=generators)
        samples[i] = np.stack([x.resize([args.size] * 2, Image.LANCZOS) for x in drawn.images])
    if rank == 0:                                                       # samples.npy comes last
        np.save(args.out / "conditions.npy", conditions)
        about = dict(model=args.out.name, guidance=args.guidance_scale - 1, scale=args.scale, seed=args.seed)
        (args.out / "samples.json").write_text(json.dumps(about | dict(source=source.is_dir())))
