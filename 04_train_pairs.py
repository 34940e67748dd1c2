"""04: Semantica. The condition is the embedding of another image of the target's page, and the model learns to vary.

Reads   DATA of 01_embed.py: images.npy, cls.npy, tokens.npy, split.npy, pages.npy (for the preview, and --dial)
        pairs.npy of 02_filter_pairs.py
Writes  DATA/pairs.pt {model, ema, optimizer, step, config}, pairs.jsonl (loss, also by noise level), pairs.png (a preview)

    minimise over theta   E | v_theta(alpha x + sigma eps, logsnr, embed(y)) - v |^2,   v = alpha eps - sigma x   (--loss v)

--dial (beyond the paper) needs no pairs.npy: it trains on all pairs of a page (whatever 02 excludes), half of the time on an
image with itself, and gives the network their similarity cos(cls_x, cls_y) as one more condition. DATA/dial.pt, dial.jsonl and
dial.png; from copy to variation by 05_sample.py --similarity.

The same images, network, schedule and steps as 03_train_recon.py: `diff 03_train_recon.py 04_train_pairs.py` is the paper's idea.
The command can be repeated at any time: it resumes, or says that it is done.

    python 04_train_pairs.py                                             # digits at 16 px on a CPU
    python 04_train_pairs.py --preset emoji64                            # 64 px, one GPU, bf16
    torchrun --nproc-per-node=8 04_train_pairs.py --data runs/mine --preset semantica64 --accumulate 4 --workers 8
"""
import system
import training

args = system.parse(training.training_parser(__doc__, dial=True))
args.out = args.out or args.data / ("dial.pt" if args.dial else "pairs.pt")
data = system.Data(args.data)
file = args.data / "pairs.npy"                                                         # [P, 2]: two images of one page
pairs = training.AllPairs(data) if args.dial else system.read_array(file, "int64", 2, made_by="02_filter_pairs.py")
training.train_images(args, data, pairs)
