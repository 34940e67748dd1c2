"""04: Semantica: condition and target are two images of one page."""
import common

args = common.parse(common.training_parser(__doc__))
args.out = args.out or args.data / "pairs.pt"
data = common.Data(args.data)
pairs = common.read_array(args.data / "pairs.npy", ndim=2, made_by="02_filter_pairs.py")
common.train(args, data, pairs)
