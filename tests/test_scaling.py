"""benchmarks/scaling.py: what it counts against closed forms and hand counts; docs/scaling.md is what it prints."""
import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.run import get_args_parser

import common
import report
import scaling

ROOT = Path(__file__).parents[1]

TOY = dict(parameters=1000, block=100, root=50, step=[3e9, 4e9], image=[2 ** 20, 2 ** 18], copies=2000)


@pytest.fixture(scope="module")
def tables():
    return scaling.make_tables(scaling.parse([]))


def test_a_preset_has_the_parameters_of_its_real_module():
    p = common.PRESETS["digits16"]
    model = common.UViT(p["size"], p["patch"], p["channels"], p["blocks"], "both", 6, (4, 5))
    c = scaling.count(p, (4, 5), 6)
    assert c["parameters"] == sum(w.numel() for w in model.parameters())
    blocks = [sum(w.numel() for w in m.parameters()) for m in model.modules() if isinstance(m, scaling.BLOCKS)]
    assert (c["block"], c["root"]) == (max(blocks), c["parameters"] - sum(blocks))


@pytest.mark.parametrize(("layer", "shapes", "flops", "backward"), [
    (nn.Linear(8, 16), [(3, 8)], 2 * 3 * 8 * 16, 1),                     # only the weight has a gradient, so once more
    (nn.Conv2d(8, 16, 3, padding=1), [(3, 8, 6, 5)], 2 * 3 * 6 * 5 * 9 * 8 * 16, 1),
    (lambda x: F.scaled_dot_product_attention(x, x[:, :, :4], x[:, :, :4]), [(3, 2, 7, 64)], 2 * 2 * 3 * 2 * 7 * 4 * 64, 2.5)])
def test_flops_of_one_layer(layer, shapes, flops, backward):
    x = torch.empty(*shapes[0], device="meta", requires_grad=not isinstance(layer, nn.Module))
    model = layer.to("meta") if isinstance(layer, nn.Module) else nn.Identity()
    found = scaling.run(model, lambda net: (net if isinstance(layer, nn.Module) else layer)(x).float().sum())
    assert (found["forward"], found["step"]) == (flops, flops * (1 + backward))   # flash attention computes its weights again


def test_kept_bytes_of_two_layers():
    net = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4)).to("meta")
    found = scaling.run(net, lambda net: net(torch.empty(3, 8, device="meta")).sum())
    x, normed, statistics, gelu, hidden = 3 * 8 * 2, 3 * 16 * 4, 2 * 3 * 4, 3 * 16 * 4, 3 * 16 * 2
    assert found["kept"] == x + normed + statistics + gelu + hidden     # in bf16, float32, float32, float32, bf16
    assert found["copies"] == 2 * (8 * 16 + 16 + 16 * 4 + 4)            # a norm's weights stay as they are


def test_types_under_autocast():
    x = torch.empty(1, 2, 4, 4, device="meta")
    with scaling.Autocast():
        h = nn.Conv2d(2, 2, 1, device="meta")(x)
        up, pooled = F.interpolate(h, scale_factor=2), F.avg_pool2d(h, 2)
        normed = nn.GroupNorm(1, 2, device="meta")(h)
    assert (h.dtype, pooled.dtype, up.dtype, normed.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)


def test_recomputing_keeps_the_inputs_of_a_block_and_repeats_all_but_its_last_product():
    block = common.ResBlock(32, 16).to("meta")
    x, emb = torch.empty(2, 32, 8, 8, device="meta", requires_grad=True), torch.empty(2, 16, device="meta")
    plain, again = (scaling.run(block, lambda net: net(x, emb).sum(), recompute) for recompute in (False, True))
    assert again["kept"] == x.nbytes + emb.nbytes
    assert plain["largest"] == plain["kept"] > 2 * again["kept"]
    conv, film = 2 * 2 * 8 * 8 * 9 * 32 * 32, 2 * 2 * 16 * 64
    assert again["step"] - plain["step"] == conv + film


def test_memory_and_traffic_of_a_toy():
    assert scaling.state_bytes(TOY, 8, False) == 20 * 1000               # weights, gradients, two moments, average
    assert scaling.state_bytes(TOY, 8, True) == 20 * 1000 / 8 + 8 * (50 + 2 * 100)
    assert scaling.traffic(TOY, 8, False, 4) == 2 * 4000 * 7 / 8         # once a step, however many backward passes
    assert scaling.traffic(TOY, 8, True, 4) == 4 * 3 * 4000 * 7 / 8
    assert scaling.traffic(TOY, 1, True, 4) == 0


def test_the_plan_fits_and_divides_the_batch():
    args = scaling.parse(["--memory", "0.01", "--usable", "1"])          # 10.24 MiB, 10 images of the toy
    found = scaling.plan(args, TOY, 96, 8, False, False)
    assert (found["micro"], found["accumulate"], found["room"]) == (6, 2, 10)
    assert found["bytes"] == 20_000 + 2000 + 6 * 2 ** 20 <= 0.01 * scaling.GiB
    assert found["compute"] == pytest.approx(96 * 3e9 / (8 * args.mfu * args.peak))
    assert scaling.plan(args, TOY, 96, 8, False, True)["micro"] == 12    # a quarter of the activations
    assert scaling.plan(args, TOY, 96, 64, False, False) is None         # 96 images do not divide by 64
    tiny = scaling.parse(["--memory", "1e-5"])
    assert scaling.plan(tiny, TOY, 96, 8, False, False) is None
    counts = dict.fromkeys(scaling.PAPERS, TOY)
    assert scaling.hours(tiny, counts).count("| - ") == 8 and scaling.commands(tiny, counts).count("# does not fit") == 6


@pytest.mark.parametrize("flags", [["--gpus", "8", "0"], ["--mfu", "-1"], ["--write", "no/such/page.md"]])
def test_bad_arguments_end_in_one_line(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        scaling.parse(flags)
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_the_page_is_what_the_script_prints(tables):
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert page == report.fill(page, tables), "run python benchmarks/scaling.py --write docs/scaling.md"
    with pytest.raises(SystemExit):
        report.fill(page.replace("<!-- hours -->", ""), tables)


def test_the_commands_have_flags_that_exist(tables):
    lines = [line for line in tables["commands"].replace("\\\n", " ").splitlines() if line.startswith(("torchrun", "python"))]
    assert len(lines) > 10
    common_flags = re.findall(r'"(--[a-z-]+)"', (ROOT / "system.py").read_text())
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[0] == "torchrun":
            launch = get_args_parser().parse_args(words[1:])
            words = ["python", launch.training_script, *launch.training_script_args]
        sources = [words[1], "training.py"] if words[1][:2] in ("03", "04") else [words[1]]
        known = common_flags + [flag for name in sources for flag in re.findall(r'"(--[a-z-]+)"', (ROOT / name).read_text())]
        assert {word for word in words if word.startswith("--")} <= set(known), line
