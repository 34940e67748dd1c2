"""kill -9 anywhere, a full disk, bad input: repeating the command ends with the same files, and nothing half written is read.

A process that has imported everything (serve, below) forks a child for each run of a script. The child may be told to kill
itself before its k-th change to the folder, a file opened for writing, renamed or removed: every k in turn, so every moment.
"""
import itertools
import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stress import contents, different, fresh, meaning, torn

ROOT = Path(__file__).parents[1]

STAGES = dict(                                                         # as on the command line, in the folder data/
    embed="01_embed.py --images images --out data --overwrite",        # of data/samples/w1 is made what is made of samples
    embed_samples="01_embed.py --data data --images data/samples/w1/samples.npy --out data/samples/w1 --cls-only",
    filter="02_filter_pairs.py --data data --low -1",
    pairs="04_train_pairs.py --data data --batch 4 --steps 4 --save-every 2 --sample-steps 2",
    sample="05_sample.py --data data --out data/samples/w1 --variations 3 --sample-steps 2",
    metrics="06_fewshot_metrics.py --data data")


# ----------------------------------------------------------------------------------------------------------------------
# In the process that forks.


def kill_before(change):
    """End this process, as kill -9 would, before its change number `change` to files in the current folder."""
    here, seen = os.getcwd(), itertools.count(1)

    def hook(event, args):
        if event not in ("open", "os.rename", "os.remove", "os.mkdir") or not isinstance(args[0], (str, Path)):
            return
        path = os.path.abspath(args[0])
        changes = {"open": event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR), "os.mkdir": not os.path.exists(path)}
        if path.startswith(here) and changes.get(event, os.path.exists(path)) and next(seen) == change:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)


def tiny_encoder(px, device):
    """Takes the place of a network: pixels as embeddings, D = 6, T = 4, C = 5."""
    def encode(images):
        x = images.flatten(1).float()
        return x[:, 100:106], x[:, 200:220].unflatten(1, (4, 5))
    return encode


def picture(figure, file, **options):
    """Takes the place of Figure.savefig, which needs half a second."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)).save(file, format="PNG")


def child(folder, command, kill_at, file_limit):
    """Run a script's command line in a folder, and exit as it does."""
    import importlib

    import matplotlib.figure

    import common
    signal.alarm(60)                                                   # nothing may hang
    torch.set_num_threads(1)
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open("../output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    matplotlib.figure.Figure.savefig = picture
    common.PRESETS["emoji16"].update(channels=(16, 32), blocks=(1, 1))
    sys.argv, code = [*command.split(), *["--device", "cpu"][:0 if command.startswith(("02", "06")) else 2]], 0
    if file_limit:                                                     # a file of more bytes than this cannot be written
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if kill_at:
        kill_before(kill_at)
    try:
        if command.startswith("01"):
            embed = importlib.import_module("01_embed")
            embed.ENCODERS = {"efficientnet_lite0": tiny_encoder}
            embed.main()
        else:
            runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def serve():
    """For each JSON line of child()'s arguments, answer with the child's exit code."""
    import importlib

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot  # noqa: F401
    import torch._dynamo  # noqa: F401                                 # which Adam imports in its first step
    for script in ("01_embed", "06_fewshot_metrics", "training"):
        importlib.import_module(script)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# In the process of the tests.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(folder, stage or command, kill_at=0, file_limit=0): (exit code, what it printed)."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def run(folder, command, kill_at=0, file_limit=0):
        output = folder.parent / "output"
        output.unlink(missing_ok=True)
        job = dict(folder=str(folder), command=STAGES.get(command, command), kill_at=kill_at, file_limit=file_limit)
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline()), output.read_text()
    yield run
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    """{stage: a folder as it is before that stage runs}, each stage run once on 3 pages of 9 images and a broken one."""
    work, kept, rng = tmp_path_factory.mktemp("made") / "work", {}, np.random.default_rng(0)
    for page in "abc":
        (work / "images" / page).mkdir(parents=True)
        for i in range(9):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(work / "images" / page / f"{i}.png")
    (work / "images" / "a" / "broken.png").write_text("not an image")
    for stage in ("embed", "filter", "pairs", "sample", "embed_samples", "metrics", "end"):
        kept[stage] = shutil.copytree(work, work.parent / stage)
        code, output = run(work, stage) if stage != "end" else (0, "")
        assert code == 0, output
    return kept


@pytest.mark.parametrize("stage", STAGES)
def test_killed_before_any_change_and_repeated(run, made, tmp_path, stage):
    """A killed run leaves whole files; the repeated command ends with those of a run that nobody killed; no *.tmp stays."""
    work, whole = fresh(made[stage], tmp_path / "work"), tmp_path / "whole"
    assert run(work, stage)[0] == 0
    before, want = contents(made[stage]), contents(shutil.copytree(work, whole))
    outputs = [name for name in want if want[name] != before.get(name)]
    for kill_at in itertools.count(1):
        fresh(made[stage], work)
        for name in outputs:                                           # as an earlier kill may have left them
            stale = work / f"{name}{'.partial' if name.endswith('.pt') else ''}.tmp"
            stale.parent.mkdir(parents=True, exist_ok=True)
            stale.write_bytes(b"half" * 10_000)
        code, output = run(work, stage, kill_at)
        if code == 0:
            break
        assert code == -signal.SIGKILL, output
        assert not torn(work, before, want)
        log = work / "data" / f"{stage}.jsonl"                         # the one file that grows in place may be torn
        if log.exists() and not log.with_suffix(".pt").exists():
            log.write_text(log.read_text() + '{"step": 5, "lo')
        code, output = run(work, stage)
        assert code == 0, f"killed before change {kill_at}: {output}"
        assert not different(work, whole), f"killed before change {kill_at}"
    assert kill_at > 2 * len(outputs)                                  # every output was opened and renamed


@pytest.mark.parametrize("stage, flag, marker, rest", [
    ("embed", " --fit pad --preset digits16", "data.json", ("images", "cls", "tokens", "pages", "split", "names")),
    ("sample", " --seed 1", "samples/w1/samples.npy", ("samples/w1/conditions", "samples/w1/samples.json"))])
def test_other_settings_killed_halfway_do_not_mix(run, made, tmp_path, stage, flag, marker, rest):
    """Where the file that says a folder is complete is there, all files are of one run, the old or the new."""
    names = [marker, *(name if "." in name else f"{name}.npy" for name in rest)]
    rng, start = np.random.default_rng(1), fresh(made["end"], tmp_path / "start")
    for name in ("a", "b"):                                            # tall, so that crop and pad differ
        Image.fromarray(rng.integers(0, 256, (40, 16, 3), np.uint8)).save(start / "images" / name / "tall.png")
    work = fresh(start, tmp_path / "work")
    assert run(work, stage)[0] == 0 and shutil.copytree(work, tmp_path / "old")
    runs = [{name: meaning(work / "data" / name) for name in names}]
    assert run(work, STAGES[stage] + flag)[0] == 0
    runs.append({name: meaning(work / "data" / name) for name in names})
    assert runs[0] != runs[1]
    for kill_at in itertools.count(1):
        fresh(tmp_path / "old", work)
        code, output = run(work, STAGES[stage] + flag, kill_at)
        if (work / "data" / marker).exists():
            assert {name: meaning(work / "data" / name) for name in names} in runs, f"killed before change {kill_at}"
        assert not (work / "data/samples/w1/cls.npy").exists() or (work / "data/samples/w1/samples.npy").exists()
        if code == 0:
            break


WORKER = """
import os, pathlib, runpy, signal, sys
sys.path[0] = {root!r}
import torch
import common

def hook(event, args):
    if event == "os.rename" and str(args[1]).endswith("two.pt.partial") and pathlib.Path(args[1]).exists():
        if not pathlib.Path("killed").exists():                # at the second checkpoint, once
            pathlib.Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
common.PRESETS["emoji16"].update(channels=(16, 32), blocks=(1, 1))
sys.addaudithook(hook)
sys.argv[0] = {root!r} + "/04_train_pairs.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_torchrun_restarts_a_killed_worker(run, made, tmp_path):
    """One of two workers is killed while it saves; torchrun --max-restarts goes on from the checkpoint before, to the same bits.

    Halving is exact, so two workers add up the gradients of one process with --accumulate 2. The variable in the environment
    keeps the new workers from the addresses of the old ones (PyTorch issue 135712).
    """
    work = fresh(made["pairs"], tmp_path / "work")
    (work / "worker.py").write_text(WORKER.format(root=str(ROOT)))
    flags = STAGES["pairs"].removeprefix("04_train_pairs.py ").replace("--steps 4", "--steps 6") + " --device cpu"
    code, output = run(work, f"04_train_pairs.py {flags} --accumulate 2 --out one.pt")
    assert code == 0, output
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                           "--max-restarts=1", "worker.py", *flags.split(), "--out", "two.pt"],
                          cwd=work, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    assert done.returncode == 0, done.stderr
    assert (work / "killed").exists() and not list(work.rglob("*.partial*"))
    assert meaning(work / "two.pt") == meaning(work / "one.pt")
    steps = [json.loads(line)["step"] for line in (work / "two.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be written, what cannot be read.


def refused(run, work, command, *words, **options):
    """The command must exit with code 2 and one line that has all the words, and leave every file as it was, and no *.tmp."""
    before = contents(work)
    code, output = run(work, command, **options)
    errors = [line for line in output.splitlines() if "error: " in line]
    assert code == 2 and len(errors) == 1 and "Traceback" not in output, output
    assert all(word in errors[0] for word in words), errors[0]
    after = contents(work)
    assert [name for name in before if before[name] != after.get(name)] == []
    assert not [path for path in work.rglob("*.tmp") if path.is_file()]
    return after.keys() - before.keys()


@pytest.mark.parametrize("stage, target", [
    ("embed", "data/images.npy"), ("filter", "data/filter.png"), ("pairs", "data/pairs.pt.partial"),
    ("sample", "data/samples/w1/samples.npy"), ("metrics", "data/metrics.png")])
def test_a_full_disk(run, made, tmp_path, stage, target):
    """Files of at most 3,000 bytes: one line names the file that does not fit, and what was there is as it was."""
    work = fresh(made["end" if stage in ("embed", "filter") else stage], tmp_path / "work")
    new = refused(run, work, stage, f"cannot write {target}", file_limit=3000)
    assert target not in new or stage in ("embed", "filter")


@pytest.mark.parametrize("stage, flags", [
    ("embed", "--out notes.txt/data"), ("embed_samples", "--out notes.txt"), ("pairs", "--out notes.txt/pairs.pt"),
    ("sample", "--out notes.txt/w1"), ("metrics", "--out notes.txt/metrics")])
def test_where_nothing_can_be_written(run, made, tmp_path, stage, flags):
    """A path below a file, which not even root can write to."""
    work = fresh(made[stage], tmp_path / "work")
    (work / "notes.txt").write_text("mine")
    assert not refused(run, work, f"{STAGES[stage]} {flags}", "notes.txt")


@pytest.mark.parametrize("stage, taken", [("filter", "sims.npy"), ("filter", "filter.png"), ("pairs", "pairs.jsonl"),
                                          ("pairs", "pairs.pt.partial"), ("metrics", "metrics.json")])
def test_an_output_that_cannot_be_opened(run, made, tmp_path, stage, taken):
    work = fresh(made[stage], tmp_path / "work")
    (work / "data" / f"{taken}.tmp").mkdir()
    refused(run, work, stage, "cannot write", taken)


READS = dict(                                                          # files that a stage must look at
    filter=("data.json", "cls.npy", "pages.npy", "split.npy", "names.npy"),
    pairs=("data.json", "images.npy", "cls.npy", "tokens.npy", "pages.npy", "split.npy", "pairs.npy"),
    sample=("data.json", "images.npy", "cls.npy", "tokens.npy", "pages.npy", "split.npy", "pairs.pt"),
    embed_samples=("data.json", "samples/w1/samples.npy"),
    metrics=("data.json", "cls.npy", "pages.npy", "split.npy", "names.npy", "samples/w1/data.json", "samples/w1/cls.npy",
             "samples/w1/conditions.npy", "samples/w1/samples.json"))
OPTIONAL = {"samples/w1/conditions.npy", "samples/w1/samples.json", "samples/w1/cls.npy"}        # 06 does without


def damages(path):
    """(what is wrong, the bytes of the file with that) for each way to damage it."""
    whole, suffix = path.read_bytes(), path.suffix
    yield "truncated", whole[:len(whole) // 2]
    yield "an archive", b"PK\x03\x04" + bytes(100)
    if suffix == ".npy":
        array, copy = np.load(path, allow_pickle=False), path.with_name("copy.npy")
        others = dict(pickled=np.array([{"a": 1}] * len(array), dtype=object), longer=np.concatenate([array, array[:1]]),
                      kind=array.astype(complex) if array.dtype.kind != "U" else np.arange(len(array)))
        for what, other in others.items():
            np.save(copy, other)
            yield what, copy.read_bytes()
        copy.unlink()
    elif suffix == ".json":
        yield "a list", b"[1, 2]"
    elif suffix == ".pt":
        for what, value in (("a tensor", torch.zeros(3)), ("other parts", dict(model=1, ema=2, step=3, config=4)),
                            ("no network", dict(model={}, ema={}, step=3, config={}))):
            torch.save(value, path)
            yield what, path.read_bytes()
    path.write_bytes(whole)


@pytest.mark.parametrize("stage", READS)
def test_damaged_input_is_one_line(run, made, tmp_path, stage):
    """Every input of a stage: missing, truncated, something else, pickled, of another length, kind or shape."""
    work, failures = fresh(made[stage], tmp_path / "work"), []
    for name in READS[stage]:
        path = work / "data" / name
        whole = path.read_bytes()
        cases = [*damages(path), *([] if name in OPTIONAL else [("missing", None)])]
        for what, damage in cases:
            if stage in ("pairs", "embed_samples") and what == "longer":                         # more of them is no damage
                continue
            path.write_bytes(damage) if damage is not None else path.unlink()
            try:
                refused(run, work, stage, file_limit=0)
            except Exception as e:
                failures.append(f"{name} {what}: {str(e)[-300:]}")
            path.write_bytes(whole)
    assert not failures, "\n\n".join(failures)


if __name__ == "__main__":
    serve()
