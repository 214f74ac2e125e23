"""DPC-KNN: density peaks among the k nearest neighbours, the clustering behind contextual tokens.

Static shapes for a fixed number of clusters; ties go to the lower index instead of the released code's noise (quirk 7).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ConfigError
from .ranking import first_in_order, precedes, rank


def distances(features: Tensor) -> Tensor:
    """Features [b, S, D] -> Euclidean distances [b, S, S] / sqrt(D), float32."""
    x = features.to(torch.float32)
    # Differences, not the expanded square: equal tokens are then at distance 0 exactly, as densities and ties need.
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[-1] ** 0.5


def dpc_knn(features: Tensor, *, clusters: int, neighbours: int) -> Tensor:
    """Cluster centres of features [b, S, D]: indices [b, clusters] int64, rising.

    A centre is dense (its `neighbours` nearest, itself among them, are near) and far from anything denser; of two
    equally dense tokens the lower index counts as the denser. Source: `cluster_dpc_knn` of the released code.
    Raises ConfigError when clusters or neighbours are not in 1..S.
    """
    tokens = features.shape[1]
    for name, value in (("clusters", clusters), ("neighbours", neighbours)):
        if not 1 <= value <= tokens:
            raise ConfigError(f"{name} is {value}, it must lie in 1..{tokens}, the number of tokens")
    distance = distances(features)
    nearest = distance.topk(neighbours, dim=-1, largest=False).values
    density = (-(nearest**2).mean(-1)).exp()
    denser = precedes(density)
    farthest = distance.flatten(1).amax(-1)[:, None, None]
    separation = torch.where(denser, distance, farthest).amin(-1)
    return first_in_order(rank(separation * density), clusters)


def merge_clusters(features: Tensor, centres: Tensor, *, beta: float = 0.6, blend: bool = False) -> Tensor:
    """Tokens [b, n, D]: each centre merged with the tokens nearest to it.

    features [b, S, D], centres [b, n] int64. With `blend`, centre * beta + mean of the others * (1 - beta); else the
    plain mean of both; a centre without others stays. Source: `merge_tokens_by_clustering` of the released code.
    """
    index = torch.arange(features.shape[1], device=features.device)
    spread = centres[:, None, :].expand(-1, features.shape[1], -1)
    to_centres = distances(features).gather(-1, spread)  # [b, S, n]
    is_centre = (centres[:, None, :] == index[:, None]).any(-1)  # [b, S]
    nearest = to_centres.argmin(-1)  # the first of equals
    slots = torch.arange(centres.shape[1], device=features.device)
    member = ((nearest[:, None, :] == slots[:, None]) & ~is_centre[:, None, :]).to(torch.float32)  # [b, n, S]
    count = member.sum(-1, keepdim=True)
    total = member @ features.to(torch.float32)
    centre = features.to(torch.float32).gather(1, centres[..., None].expand(-1, -1, features.shape[-1]))
    if blend:
        merged = beta * centre + (1 - beta) * total / count.clamp(min=1)
    else:
        merged = (centre + total) / (count + 1)
    return torch.where(count > 0, merged, centre).to(features.dtype)
