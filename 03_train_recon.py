"""03: the reconstruction baseline. The condition is the embedding of the target itself, and the model learns to copy.

Reads   DATA of 01_embed.py: images.npy, cls.npy, tokens.npy, split.npy, pages.npy (for the preview)
Writes  DATA/recon.pt {model, ema, optimizer, step, config}, recon.jsonl (loss, also by noise level), recon.png (a preview)

    minimise over theta   E | v_theta(alpha x + sigma eps, logsnr, embed(x)) - v |^2,   v = alpha eps - sigma x   (--loss v)

The same images, network, schedule and steps as 04_train_pairs.py: `diff 03_train_recon.py 04_train_pairs.py` is the paper's idea.
The command can be repeated at any time: it resumes, or says that it is done.

    python 03_train_recon.py                                             # digits at 16 px on a CPU
    python 03_train_recon.py --preset emoji64                            # 64 px, one GPU, bf16
    torchrun --nproc-per-node=8 03_train_recon.py --data runs/mine --preset semantica64 --accumulate 4 --workers 8
"""
import numpy as np

import system
import training

args = system.parse(training.training_parser(__doc__))
args.out = args.out or args.data / "recon.pt"
data = system.Data(args.data)
train = np.flatnonzero(data.split == 0)
pairs = np.stack([train, train], axis=1)                                 # [N, 2]: the condition is the target
training.train_images(args, data, pairs)
