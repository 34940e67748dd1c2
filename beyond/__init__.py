"""Beyond the papers: a similarity dial (dial.py), other ways to sample (sample.py). docs/beyond.md: what they gave."""
import torch

import common

DIAL = 257                                                             # columns that embed() adds to cls


def embed(similarity):
    """Similarities [B], nan where none is given -> [B, 257]: sinusoids, as of the noise level, and if one is given."""
    given = ~similarity.isnan()[:, None]                               # [B, 1]
    return torch.cat([common.sinusoids(similarity.nan_to_num() / 2) * given, given], 1)
