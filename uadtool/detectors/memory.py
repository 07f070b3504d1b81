"""A memory of good patches that is a part of the graph: PatchCore (Roth et al., CVPR 2022, arXiv 2106.08265), compact.

The distance to an entry counts in units of what is usual around that entry, so that rims and textures that vary do not
outshout a scratch on a plain surface (as in the local outlier factor, Breunig et al., SIGMOD 2000).
"""

import torch
from torch import Tensor, nn

NEIGHBOURS, PSEUDO_COUNT = 10, 10
"""Entries around one whose patches tell the usual distance there, and the weight, in patches, of the overall one."""
CHUNK = 500
"""Entries whose distances are computed at once: so they stay in the cache. Ten times faster than all at once."""


class PatchMemory(nn.Module):
    """Distance of each patch to the memory: [N, D, h, w] -> [N, h, w], in units of the usual distance.

    min |x - c|^2 / m^2 over entries c with their usual distances m is -max of a linear function of (x, |x|^2, 1): a
    matrix product and a maximum, which every runtime has fast. ``parts`` hold it: [D + 2, up to 500 entries] each.
    """

    def __init__(self, entries: int, size: int) -> None:
        super().__init__()
        self.entries = entries
        self.parts = nn.ParameterList(nn.Parameter(torch.zeros(size + 2, min(CHUNK, entries - start)), False)
                                      for start in range(0, entries, CHUNK))

    @torch.no_grad()
    def fill(self, entries: Tensor, usual: Tensor) -> None:
        """Set the entries [entries, D] and their usual distances [entries]."""
        weight = usual.double().square().reciprocal()
        points = entries.double()
        linear = torch.cat([2 * points, -torch.ones_like(points[:, :1]), -points.square().sum(1, keepdim=True)], dim=1)
        for part, values in zip(self.parts, torch.split(linear * weight[:, None], CHUNK)):
            part.copy_(values.T)

    def forward(self, patches: Tensor) -> Tensor:
        x = patches.permute(0, 2, 3, 1)
        extended = torch.cat([x, (x * x).sum(3, keepdim=True), torch.ones_like(x[..., :1])], dim=3).flatten(1, 2)
        nearest = [(extended @ part).amax(2) for part in self.parts]
        squared = -torch.stack(nearest).amax(0)
        return squared.clamp(min=0).sqrt().view(patches.shape[0], patches.shape[2], patches.shape[3])


@torch.inference_mode()
def coreset(patches: Tensor, count: int) -> Tensor:
    """Indices of ``count`` of the patches [N, D] such that none of the others is far from all of them.

    Greedy k-centre: the next one is always that with the greatest distance to those chosen so far; the first one is
    that with the greatest distance to the mean.
    """
    count = min(count, len(patches))
    norms = patches.square().sum(1)
    distances = (patches - patches.mean(0)).square().sum(1)
    chosen = torch.empty(count, dtype=torch.long)
    for place in range(count):
        index = int(distances.argmax())
        chosen[place] = index
        to_it = (norms + norms[index]).addmv_(patches, patches[index], alpha=-2)
        distances = to_it if place == 0 else torch.minimum(distances, to_it)
        distances[index] = -1  # never again, even where patches are equal
    return chosen


@torch.inference_mode()
def usual_distances(patches: Tensor, chosen: Tensor) -> Tensor:
    """Mean distance to the memory of the patches around each entry: [entries].

    A patch counts for its nearest entry and for that one's neighbours. Those that are entries themselves tell nothing.

    Args:
        patches: of good images [N, D].
        chosen: indices of those that are the entries.
    """
    entries = patches[chosen]
    rest = torch.ones(len(patches), dtype=torch.bool)
    rest[chosen] = False
    sums, counts = torch.zeros(len(entries)), torch.zeros(len(entries))
    for part in torch.split(patches[rest], 2048):
        distances, nearest = torch.cdist(part, entries).min(1)
        sums.index_add_(0, nearest, distances)
        counts.index_add_(0, nearest, torch.ones_like(distances))
    usual = sums.sum() / counts.sum().clamp(min=1)
    around = torch.cat([torch.cdist(part, entries).topk(min(NEIGHBOURS, len(entries)), largest=False).indices
                        for part in torch.split(entries, 2048)])
    means = (sums[around].sum(1) + PSEUDO_COUNT * usual) / (counts[around].sum(1) + PSEUDO_COUNT)
    return means.clamp(min=1e-6)


@torch.inference_mode()
def principal_components(patches: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean [D] and the first principal components [count, D] of patches [N, D]."""
    mean = patches.mean(0)
    centred = (patches - mean).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return mean, vectors.flip(1)[:, :count].T.float()
