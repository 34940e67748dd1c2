"""The training loop: batches are functions of (seed, step), resume equals the uninterrupted run bit for bit, nan stops it."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import common
import system
import numpy as np
import pytest
import torch
import training

ROOT = Path(__file__).parents[1]


def run(args, pairs=None):
    data = system.Data(args.data)
    training.train_images(args, data, system.read_array(args.data / "pairs.npy") if pairs is None else pairs)
    return system.read_checkpoint(args.out)


def assert_same(a, b):
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    assert a["step"] == b["step"] and a["config"] == b["config"]
    moments = [c["optimizer"]["state"] for c in (a, b)]
    assert moments[0].keys() == moments[1].keys() == dict(a["model"]).keys() - {k for k in a["model"] if "_norm." in k}
    assert all(torch.equal(m[k], moments[1][name][k]) for name, m in moments[0].items() for k in ("exp_avg", "exp_avg_sq"))


def test_ranks_split_the_global_batch(train_args):
    args = train_args()
    data, pairs = system.Data(args.data), system.read_array(args.data / "pairs.npy")
    whole = training.PairBatches(args, data, pairs, 0, 1)[7]
    parts = [training.PairBatches(args, data, pairs, rank, 2)[7] for rank in (0, 1)]
    for key in whole:
        joined = torch.stack([parts[0][key], parts[1][key]], 1).flatten(0, 1)
        assert torch.equal(joined, whole[key])
    assert not torch.equal(whole["x"], training.PairBatches(args, data, pairs, 0, 1)[8]["x"])


def test_times_are_stratified_and_conditions_dropped_at_the_given_rate(train_args):
    args = train_args("--batch", "500")
    batch = training.PairBatches(args, system.Data(args.data), system.read_array(args.data / "pairs.npy"), 0, 1)[0]
    assert torch.equal((batch["t"] * 500).long(), torch.arange(500))          # one t in each of 500 strata
    assert 0.05 < batch["drop"].float().mean() < 0.15


def test_reconstruction_and_pairs_read_the_right_images(train_args):
    """With (i, i) pairs condition and target are one image; with page pairs they are two images of one page, never held out."""
    args = train_args("--batch", "64", "--cond", "film")
    data, pairs = system.Data(args.data), system.read_array(args.data / "pairs.npy")
    for chosen, same in ((np.stack([np.arange(20)] * 2, 1), True), (pairs, False)):
        batch = training.PairBatches(args, data, chosen, 0, 1)[0]
        condition = [int((data.cls == c.numpy()).all(1).nonzero()[0][0]) for c in batch["cls"]]
        target = [int((data.images == x.numpy()).all((1, 2, 3)).nonzero()[0][0]) for x in batch["x"]]
        assert all((c == t) == same and data.pages[c] == data.pages[t] for c, t in zip(condition, target))
        if not same:
            assert data.split[condition].max() == 0 and data.split[target].max() == 0


def test_a_dial_trains_on_all_pairs_of_a_page_and_their_similarity(train_args):
    """Every (i, j) of a page once, half of a batch i = j; the cosine of the two as a condition, dropped at the same rate."""
    args = train_args("--batch", "2000")
    data = system.Data(args.data)
    everything = training.AllPairs(data)
    found = everything[np.arange(len(everything))]
    assert sorted(map(tuple, found.tolist())) == [(i, j) for i in range(20) for j in range(20)
                                                  if i // 5 == j // 5 and i % 5 < 4 and j % 5 < 4]
    batch = training.PairBatches(args, data, everything, 0, 1)[3]
    drawn = everything[np.random.default_rng([args.seed, 3]).integers(len(everything), size=2000)]
    target = np.array([(data.images == x.numpy()).all((1, 2, 3)).argmax() for x in batch["x"]])
    same = drawn[:, 0] == target
    assert np.array_equal(np.where(same, drawn[:, 0], drawn[:, 1]), target)
    assert same.mean() == pytest.approx(0.5 + 0.5 / 4, abs=0.03)       # a page has four training images
    a, b = (data.cls[i] / np.linalg.norm(data.cls[i], axis=1, keepdims=True) for i in (drawn[:, 0], target))
    dropped = batch["similarity"].isnan()
    np.testing.assert_allclose(batch["similarity"][~dropped], (a * b).sum(1)[~dropped], atol=1e-6)
    assert dropped.float().mean() == pytest.approx(0.1, abs=0.03)
    assert (dropped & batch["drop"]).float().mean() == pytest.approx(0.01, abs=0.01)
    plain = training.PairBatches(args, data, found, 0, 1)[3]           # without a dial the batch is what it was
    assert "similarity" not in plain and all(torch.equal(plain[key], batch[key]) for key in plain.keys() - {"x"})


def test_one_in_float32_is_still_a_noise_level(train_args):
    """t < 1 in float64 can round to 1 in float32, beyond the last of the five bins of the log."""
    args = train_args("--steps", "1", "--batch", "8")
    true_item = training.PairBatches.__getitem__
    try:
        training.PairBatches.__getitem__ = lambda self, step: true_item(self, step) | dict(t=torch.ones(8))
        assert run(args)["step"] == 1
    finally:
        training.PairBatches.__getitem__ = true_item


def test_learning_rate_warms_up_and_decays(train_args):
    args = train_args("--steps", "1000", "--lr", "0.5")
    assert training.learning_rate(0, args) == pytest.approx(0.5 / args.warmup, rel=1e-3)
    assert training.learning_rate(500, args) == pytest.approx(0.25)
    assert training.learning_rate(999, args) < 1e-5
    args.decay = "constant"
    assert training.learning_rate(999, args) == 0.5


def test_training_reduces_the_loss_and_logs_it(train_args):
    args = train_args("--steps", "60", "--log-every", "10", "--lr", "5e-3", "--batch", "16")
    args.warmup = 5
    data = system.Data(args.data)
    one = np.zeros((1, 2), np.int64)                                          # one image: easy to learn by heart
    training.train_images(args, data, one)
    log = [json.loads(line) for line in args.out.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [10, 20, 30, 40, 50, 60]
    assert log[-1]["loss"] < 0.75 * log[0]["loss"] and len(log[0]["by_noise_level"]) == 5
    assert args.out.with_suffix(".png").exists() and not Path(f"{args.out}.partial").exists()


def test_resume_equals_the_uninterrupted_run(train_args, monkeypatch):
    whole = run(train_args("--steps", "7", "--out", str(train_args().data / "whole.pt")))
    args = train_args("--steps", "7", "--save-every", "3")
    true_rate = training.learning_rate
    with monkeypatch.context() as patch:
        def crash(step, args):
            if step == 5:
                raise KeyboardInterrupt
            return true_rate(step, args)
        patch.setattr(training, "learning_rate", crash)
        with pytest.raises(KeyboardInterrupt):
            run(args)
    assert system.read_checkpoint(f"{args.out}.partial")["step"] == 3 and not args.out.exists()
    assert_same(run(args), whole)
    log = [json.loads(line)["step"] for line in args.out.with_suffix(".jsonl").read_text().splitlines()]
    assert log == sorted(set(log)) and log[-1] == 7


def test_accumulation_equals_one_backward_pass(train_args):
    one = run(train_args("--steps", "3", "--out", str(train_args().data / "one.pt")))
    two = run(train_args("--steps", "3", "--accumulate", "2", "--out", str(train_args().data / "two.pt")))
    for name in one["model"]:
        torch.testing.assert_close(one["model"][name], two["model"][name], atol=2e-4, rtol=1e-3)


def test_a_non_finite_loss_stops_and_keeps_the_last_checkpoint(train_args, capsys):
    args = train_args("--steps", "6", "--save-every", "2", "--log-every", "1")
    true_loss, calls = common.diffusion_loss, []

    def poisoned(*a):
        calls.append(1)
        return true_loss(*a) * (float("nan") if len(calls) == 5 else 1)
    common.diffusion_loss = poisoned
    try:
        with pytest.raises(SystemExit) as stop:
            run(args)
    finally:
        common.diffusion_loss = true_loss
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "not finite at step 5" in message and "--lr" in message
    assert system.read_checkpoint(f"{args.out}.partial")["step"] == 4


def test_other_settings_do_not_continue_a_checkpoint(train_args, capsys):
    run(train_args("--steps", "2"))
    with pytest.raises(SystemExit) as stop:
        run(train_args("--steps", "2", "--lr", "1"))
    assert stop.value.code == 2 and "another lr" in capsys.readouterr().err


def test_sigterm_and_kill_then_the_same_command_finishes(tiny_data):
    """03 and 04 through their command lines: SIGTERM saves and exits 143, kill -9 loses at most --save-every steps."""
    command = [sys.executable, ROOT / "04_train_pairs.py", "--data", tiny_data, "--device", "cpu", "--batch", "2",
               "--steps", "15", "--save-every", "5", "--sample-steps", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = tiny_data / "whole.pt"
    uninterrupted = subprocess.Popen([*command, "--out", whole], cwd=ROOT, env=env)
    for sig, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        process = subprocess.Popen([*command, "--workers", "1"], cwd=ROOT, env=env, stderr=subprocess.DEVNULL,
                                   start_new_session=True)
        partial, before = tiny_data / "pairs.pt.partial", 0
        before = partial.stat().st_mtime_ns if partial.exists() else 0
        while process.poll() is None and not (partial.exists() and partial.stat().st_mtime_ns > before):
            time.sleep(0.01)
        os.killpg(process.pid, sig)                                    # its loader too, as torchrun and schedulers do
        assert process.wait() == code
        assert not (tiny_data / "pairs.pt").exists()
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    assert uninterrupted.wait() == 0
    assert_same(system.read_checkpoint(tiny_data / "pairs.pt"), system.read_checkpoint(whole))
    subprocess.run([sys.executable, ROOT / "03_train_recon.py", "--data", tiny_data, "--steps", "1", "--batch", "2",
                    "--sample-steps", "1"], cwd=ROOT, check=True)
    assert system.read_checkpoint(tiny_data / "recon.pt")["step"] == 1


@pytest.mark.parametrize("cond", ["both", "film"])
def test_two_processes_train_as_one(tiny_data, cond):
    """torchrun with two gloo processes: the same global batches, gradients averaged, so the same weights but for rounding."""
    command = [ROOT / "03_train_recon.py", "--data", tiny_data, "--device", "cpu", "--batch", "4", "--steps", "3", "--lr", "1e-4",
               "--cond", cond, "--sample-steps", "1"]
    one, two = tiny_data / "one.pt", tiny_data / "two.pt"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command, "--out", one], check=True, cwd=ROOT, env=env)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517", *command,
                    "--accumulate", "2", "--out", two], check=True, cwd=ROOT, env=env)
    one, two = system.read_checkpoint(one), system.read_checkpoint(two)
    for name in one["model"]:
        torch.testing.assert_close(one["model"][name], two["model"][name], atol=1e-5, rtol=1e-4)


def test_bf16_trains_and_the_average_has_no_graph(train_args, monkeypatch):
    kept = []
    true_update = training.update_ema
    monkeypatch.setattr(training, "update_ema", lambda ema, *rest: (kept.append(ema), true_update(ema, *rest)))
    args = train_args("--steps", "2", "--amp", "bf16")
    state = run(args)
    assert all(p.grad_fn is None and not p.requires_grad for p in kept[0].parameters())
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in state["model"].values())


@pytest.mark.parametrize("pairs", [[[0, 1], [2, 4]], [[0, 20]], [[-1, 0]]])
def test_pairs_of_other_data_are_refused(train_args, capsys, pairs):
    """4 is held out, there are 20 images."""
    with pytest.raises(SystemExit) as stop:
        run(train_args("--steps", "1"), np.array(pairs))
    assert stop.value.code == 2 and "02_filter_pairs.py again" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--seed -1", "--lr -1", "--lr nan", "--workers -1", "--ema 1", "--steps 0", "--batch 0"])
def test_numbers_out_of_range_are_one_line(train_args, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        run(train_args(*flags.split()))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and flags.split()[0] in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "xla", *["cuda"] * (not torch.cuda.is_available())])
def test_a_device_that_is_not_there_is_one_line(capsys, device):
    with pytest.raises(SystemExit) as stop:
        system.start(device)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and "cpu" in error


def test_data_opens_only_what_is_asked_for(tiny_data, capsys):
    for name in ("tokens", "names", "images"):
        (tiny_data / f"{name}.npy").unlink()
    data = system.Data(tiny_data)
    assert data.cls.shape == (20, 6) and data.conditions().tolist() == [4, 9, 14, 19] and not hasattr(data, "nonsense")
    with pytest.raises(SystemExit) as stop:
        data.embeddings([0], "both", "cpu")
    assert stop.value.code == 2 and "tokens.npy is missing" in capsys.readouterr().err


@pytest.mark.parametrize("bad", ["missing", "truncated", "pickled", "shape", "checkpoint"])
def test_bad_files_are_one_line_and_exit_code_2(tiny_data, bad, capsys):
    path = tiny_data / "cls.npy"
    if bad == "missing":
        path.unlink()
    elif bad == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif bad == "pickled":
        np.save(path, np.array([{"a": 1}] * 20, dtype=object), allow_pickle=True)
    elif bad == "shape":
        np.save(path, np.zeros((19, 6), np.float32))
    with pytest.raises(SystemExit) as stop:
        if bad == "checkpoint":
            torch.save([1, 2], tiny_data / "x.pt")
            system.read_checkpoint(tiny_data / "x.pt")
        assert not system.Data(tiny_data).cls
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert ("x.pt" if bad == "checkpoint" else "cls.npy") in error


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        with system.writing(path) as f:
            f.write(b"half")
            raise RuntimeError
    assert path.read_text() == "old"
    with system.writing(path) as f:
        f.write(b"new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(SystemExit):
        with system.writing("/proc/no/such/folder/a"):
            pass


# The script sys.argv[2] with a small network, in a process that dies, if it is not 0, at step sys.argv[1].
WRAPPER = """import common, os, runpy, sys, training
common.PRESETS["digits16"] |= dict(channels=(16, 32), blocks=(1, 1))
real_update, dies_at = training.update_ema, int(sys.argv[1])
def update_ema(ema, model, step, decay):
    real_update(ema, model, step, decay)
    if step + 1 == dies_at:
        os._exit(9)
training.update_ema, sys.argv = update_ema, sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_sharded_training_and_resuming_on_another_number_of_processes(tiny_data, train_args):
    """--fsdp on two gloo processes ends where one plain process does; its slices resume anywhere, and export() joins them."""
    (tiny_data / "wrapper.py").write_text(WRAPPER)
    flags = ["--device", "cpu", "--batch", "4", "--steps", "4", "--lr", "1e-4", "--save-every", "2", "--sample-steps", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def train(out, dies_at, *options):
        engine = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29519"] if options else []
        command = [*engine, tiny_data / "wrapper.py", dies_at, ROOT / "03_train_recon.py", "--data", tiny_data, *flags, *options]
        return subprocess.run([sys.executable, *map(str, command), "--out", out], cwd=ROOT, env=env).returncode
    whole, sharded, cut = (tiny_data / f"{name}.pt" for name in ("whole", "sharded", "cut"))
    assert train(whole, 0) == 0
    assert train(sharded, 0, "--fsdp", "--recompute", "--accumulate", "2") == 0
    assert train(cut, 3, "--fsdp") != 0
    slices = Path(f"{cut}.sharded/00000002")
    assert not cut.exists() and training.newest_slices(cut) == slices
    training.export(slices, tiny_data / "early.pt")
    early = system.read_checkpoint(tiny_data / "early.pt")
    assert early["step"] == 2
    assert train(cut, 0) == 0                                                            # two ranks' slices, one plain process
    assert not slices.parent.exists() and not Path(f"{cut}.partial").exists()
    whole, sharded, cut = (system.read_checkpoint(path) for path in (whole, sharded, cut))
    for other in (sharded, cut):
        assert other["config"] == whole["config"] and other["step"] == 4
        assert other["optimizer"]["state"].keys() == whole["optimizer"]["state"].keys()
        for part in ("model", "ema"):
            for name in whole[part]:
                torch.testing.assert_close(other[part][name], whole[part][name], atol=1e-5, rtol=1e-4)
    assert any(not torch.equal(early["model"][name], whole["model"][name]) for name in whole["model"])


def test_recomputed_blocks_give_the_same_weights(train_args):
    plain, again = (run(train_args("--steps", "2", *flags, "--out", str(train_args().data / f"{len(flags)}.pt")))
                    for flags in ((), ("--recompute",)))
    for name in plain["model"]:
        torch.testing.assert_close(plain["model"][name], again["model"][name], atol=1e-6, rtol=1e-5)


def test_what_cannot_be_compiled_runs_as_it_is(train_args, monkeypatch, capsys):
    """A compiler that fails, in the forward pass or only in the backward pass, changes nothing but a line on standard error."""
    class Broken(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no C++ compiler\nfound")

    plain = run(train_args("--steps", "2", "--out", str(train_args().data / "plain.pt")))
    broken = dict(backward=lambda model: lambda *a, **k: Broken.apply(model(*a, **k)), forward=lambda model: None)
    for name, breaks in broken.items():
        monkeypatch.setattr(torch, "compile", breaks)
        assert_same(run(train_args("--steps", "2", "--compile", "--out", str(train_args().data / f"{name}.pt"))), plain)
        error = capsys.readouterr().err
        assert error.count("--compile: ") == 1 and "going on without it" in error
        assert name == "forward" or "RuntimeError, no C++ compiler;" in error


def test_fsdp_without_torchrun_is_one_line(train_args, capsys):
    with pytest.raises(SystemExit) as stop:
        run(train_args("--fsdp"))
    assert stop.value.code == 2 and "torchrun" in capsys.readouterr().err
