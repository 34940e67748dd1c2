"""Time and memory of 01 and 02 as the rows grow: the real scripts on 100,000 to 10 million synthetic images in pages of 10.

Images are 4 x 4 pixels and the encoder only flattens them (D = 48), so 01 is measured without its encoder: reading, decoding,
writing. 02 is then run on the folder that 01 wrote. Linux only. Writes rows.json and rows.txt into --out, a row a script:

    seconds     wall time, and us_row, microseconds a row
    anonymous   peak of the memory that a process must have, MB: what may grow with the rows only by a few bytes a row
    resident    peak of all its memory, MB (getrusage): parts of mapped files count, which the system takes back when it must
    written     size of the files it left, MB

    OMP_NUM_THREADS=1 python benchmarks/rows.py                     # 100,000 and 1 million rows: 0.7 GB of disk
    OMP_NUM_THREADS=1 python benchmarks/rows.py --rows 10000000     # 6 GB of disk
"""
import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT, SIZE, PAGE = Path(__file__).resolve().parents[1], 4, 10


def make_images(path, pages):
    """[pages, PAGE, SIZE, SIZE, 3] uint8: noise around a mean image of each page. Written in parts, in a process of its own."""
    import numpy as np
    rng = np.random.default_rng(0)
    images = np.lib.format.open_memmap(path, "w+", np.uint8, (pages, PAGE, SIZE, SIZE, 3))
    for start in range(0, pages, 10_000):
        mean = rng.normal(127, 40, (len(images[start:start + 10_000]), 1, SIZE, SIZE, 3))
        images[start:start + 10_000] = (mean + rng.normal(0, 30, (len(mean), PAGE, SIZE, SIZE, 3))).clip(0, 255)


def embed(images, out):
    """01_embed.py with an encoder and a preset of this size."""
    sys.path.insert(0, str(ROOT))
    common, script = importlib.import_module("common"), importlib.import_module("01_embed")
    common.PRESETS["rows"] = dict(common.PRESETS["digits16"], size=SIZE, source=None)
    script.ENCODERS["flatten"] = lambda px, device: lambda x: (x.flatten(1).float() - 127, x[:, :1, 0].float())
    sys.argv = ["01_embed.py", "--images", images, "--out", out, "--preset", "rows", "--encoder", "flatten", "--batch", "256",
                "--device", "cpu"]
    script.main()
    meta = Path(out) / "data.json"                                      # a preset that 02 knows
    meta.write_text(json.dumps(json.loads(meta.read_text()) | dict(preset="digits16")))


def measure(*command):
    """Run a command: wall seconds, peak anonymous and peak resident memory in MB."""
    start, anonymous = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL)
    while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        status = Path(f"/proc/{process.pid}/status").read_text()
        anonymous = max([anonymous, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.2)
    if ended[1]:
        sys.exit(f"{command} failed")
    return dict(seconds=time.perf_counter() - start, anonymous=anonymous / 1e3, resident=ended[2].ru_maxrss / 1e3)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    p.add_argument("--out", type=Path, default=Path("runs"), help="folder for rows.json and rows.txt")
    args = p.parse_args()
    heads = ("seconds", "us_row", "anonymous", "resident", "written")
    found, lines = [], [f"{'rows':>12}  {'script':20}" + "".join(f"{head:>11}" for head in heads)]
    for n in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            images, data = Path(folder, "images.npy"), Path(folder, "data")
            subprocess.run([sys.executable, __file__, "make_images", images, str(n // PAGE)], check=True)
            for script, *command in (("01_embed.py", __file__, "embed", images, data),
                                     ("02_filter_pairs.py", ROOT / "02_filter_pairs.py", "--data", data)):
                before = sum(f.stat().st_size for f in data.glob("*"))
                row = dict(rows=n, script=script, **measure(*command))
                row["us_row"] = 1e6 * row["seconds"] / n
                row["written"] = (sum(f.stat().st_size for f in data.glob("*")) - before) / 1e6
                found.append(row)
                lines.append(f"{n:12,}  {script:20}" + "".join(f"{row[head]:11.1f}" for head in heads))
                print("\n".join(lines[-1:] if len(found) > 1 else lines), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rows.json").write_text(json.dumps(found, indent=1))
    (args.out / "rows.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["make_images"]:
        make_images(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:2] == ["embed"]:
        embed(*sys.argv[2:])
    else:
        main()
