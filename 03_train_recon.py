"""03: the reconstruction baseline: the condition is the embedding of the target itself, and the model learns to copy."""
import numpy as np

import common

args = common.parse(common.training_parser(__doc__))
args.out = args.out or args.data / "recon.pt"
data = common.Data(args.data)
train = np.flatnonzero(data.split == 0)
pairs = np.stack([train, train], axis=1)          # condition = target
common.train(args, data, pairs)
