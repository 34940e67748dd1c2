"""A judge of digits that the diffusion models know nothing of: a small CNN, trained to read the training digits.

Reads   DATA of 01 on examples/digits.py: images.npy, names.npy, split.npy, pages.npy; each sample folder S of 05
Writes  DATA/judge and S/judge: cls.npy [.., 64], its features, and data.json, for 06_fewshot_metrics.py --judge judge
        DATA/judge/judge.pt, its weights, so that all samples of DATA have one judge
        DATA/judge/read.json, for each S: read, the share of samples read as their condition's digit; by_digit, the same
        for each digit; spread, the mean distance of two samples of a condition over that of two real held-out digits of
        its class (1: as different as people's drawings; 0: all alike). Misread samples add to the spread.
        Samples of --y (2SDM) have no conditions: of them features only

    python -m examples.digits_judge                                    # all of runs/digits16/samples, one minute
    python 06_fewshot_metrics.py --judge judge --out runs/digits16/judge
"""
import json
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common

EPOCHS, BATCH = 20, 64


class Judge(nn.Module):
    """Images [B, S, S, 3] uint8 -> features [B, 64], scores of the digits [B, 10]."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2))
        self.features = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 4 * 4, 64), nn.ReLU())
        self.scores = nn.Linear(64, 10)

    def forward(self, images, shift=(0, 0)):
        x = images.float().mean(3)[:, None] / 255                       # [B, 1, S, S], digits are grey
        x = F.adaptive_avg_pool2d(x, 16).roll(shift, (2, 3))
        features = self.features(self.conv(x))
        return features, self.scores(features)


def train(images, digits, seed):
    """A judge of images [N, S, S, 3] uint8 that show digits [N]; each batch is shifted by up to a pixel."""
    torch.manual_seed(seed)
    judge, rng = Judge().train(), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in tqdm(range(EPOCHS), "judge", unit="epoch", disable=None):
        for rows in torch.from_numpy(rng.permutation(len(digits))).split(BATCH):
            _, scores = judge(images[rows], tuple(rng.integers(-1, 2, 2)))
            optimizer.zero_grad()
            F.cross_entropy(scores, digits[rows]).backward()
            optimizer.step()
        schedule.step()
    return judge.eval()


@torch.inference_mode()
def look(judge, images):
    """Features [N, 64] and digits read [N] of images [N, S, S, 3] uint8."""
    features, scores = zip(*(judge(part) for part in torch.from_numpy(np.array(images)).split(1000)))
    return torch.cat(features), torch.cat(scores).argmax(1)


def distance(features):
    """Mean distance of two different rows of features [n, d]."""
    return F.pdist(features).mean().item()


def main():
    p = common.parser(__doc__)
    p.add_argument("--samples", type=Path, nargs="+", metavar="S", help="sample folders (default DATA/samples/*)")
    args = common.parse(p)
    images, split, pages = (common.load(args.data / f"{name}.npy") for name in ("images", "split", "pages"))
    found = [re.search(r"digit(\d)-\d+\.png$", str(name)) for name in common.load(args.data / "names.npy")]
    if None in found:
        common.die(f"{args.data}: its images are not those of examples/digits.py, so the digits are not known")
    digits, out = torch.tensor([int(match[1]) for match in found]), args.data / "judge"
    path, known, held_out = out / "judge.pt", split == 0, np.flatnonzero(split == 1)
    if not path.exists():
        weights = train(torch.from_numpy(images[known]), digits[known], args.seed).state_dict()
        with common.writing(path) as f:
            torch.save(weights, f)
    judge = Judge().eval()
    judge.load_state_dict(common.load(path))
    encoder = dict(name=f"digits_judge {common.checksum(np.fromfile(path, np.uint8))}", px=16, size=args.size, dim=64)

    def write(folder, features):
        with common.writing(folder / "cls.npy") as f:
            np.save(f, features.numpy())
        with common.writing(folder / "data.json") as f:
            f.write(json.dumps(dict(preset=args.preset, encoder=encoder)).encode())

    real, read = look(judge, images)
    write(out, real)
    print(f"the judge reads {(read == digits)[held_out].float().mean():.1%} of the held-out digits rightly")
    table = {}
    for folder in args.samples or sorted(path.parent for path in args.data.glob("samples/*/samples.npy")):
        samples = common.load(folder / "samples.npy")
        features, read = look(judge, samples.reshape(-1, *samples.shape[2:]))
        write(folder / "judge", features)
        if not (folder / "conditions.npy").exists():                    # rows of 2SDM: told no digit
            continue
        conditions = common.load(folder / "conditions.npy")
        wanted = digits[torch.from_numpy(np.array(conditions))]
        rightly = (read.view(samples.shape[:2]) == wanted[:, None]).float().mean(1)                  # [n]
        own = sum(map(distance, features.view(*samples.shape[:2], 64)))
        theirs = sum(distance(real[held_out[pages[held_out] == pages[c]]]) for c in conditions)
        by_digit = {d: rightly[wanted == d].mean().item() for d in wanted.unique().tolist()}
        table[str(folder)] = dict(read=rightly.mean().item(), spread=own / theirs, by_digit=by_digit)
        print(f"{folder}: read {rightly.mean():.3f}, worst {min(by_digit.values()):.2f}, spread {own / theirs:.2f}")
    with common.writing(out / "read.json") as f:
        f.write(json.dumps(table, indent=1).encode())


if __name__ == "__main__":
    main()
