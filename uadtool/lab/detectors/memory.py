"""A compact memory bank of good patches inside the graph: PatchCore (Roth et al., CVPR 2022, arXiv 2106.08265)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCHES = 60_000
"""Candidates that a memory chooses from; every image contributes the same number."""
CHUNK = 500
"""Entries whose distances are computed at once. They then stay in the cache, which is ten times faster."""


class PatchMemory(nn.Module):
    """Distance of each patch to the nearest entry: features [N, C, h, w] -> [N, 1, h, w].

    A patch is the mean of ``context`` x ``context`` positions, in at most ``components`` principal components of the
    standardised channels.
    min |x - c|^2 over entries c is |x|^2 - max (2 x.c - |c|^2): a matrix product and a maximum, which are fast in every
    runtime. ``parts`` hold 2 c and -|c|^2: [components + 1, up to 500 entries] each.
    """

    def __init__(self, channels: int, components: int, entries: int, context: int) -> None:
        super().__init__()
        size = min(channels, components)
        self.project = nn.Conv2d(channels, size, 1)
        self.entries, self.context = entries, context
        self.parts = nn.ParameterList(nn.Parameter(torch.zeros(size + 1, min(CHUNK, entries - start)), False)
                                      for start in range(0, entries, CHUNK))

    def forward(self, features: Tensor) -> Tensor:
        x = self._average(self.project(features)).permute(0, 2, 3, 1)
        extended = torch.cat([x, torch.ones_like(x[..., :1])], dim=3).flatten(1, 2)
        nearest = torch.stack([(extended @ entries).amax(2) for entries in self.parts]).amax(0)
        squared = (x * x).sum(3) - nearest.view(x.shape[0], x.shape[1], x.shape[2])
        return squared.clamp(min=0).sqrt().unsqueeze(1)

    @torch.no_grad()
    def fit(self, features: Iterable[Tensor], images: int, seed: int) -> None:
        """Choose principal components and entries, in place, from batches of feature maps of ``images`` good images."""
        per_image = max(1, PATCHES // images)
        generator = torch.Generator().manual_seed(seed)
        candidates = []
        for batch in features:
            for values in self._average(batch.float()).flatten(2):
                positions = torch.randperm(values.shape[1], generator=generator)[:per_image]
                candidates.append(values[:, positions].T)
        patches = torch.cat(candidates)
        weight, bias = standardized_components(patches, self.project.out_channels)
        self.project.weight.copy_(weight[:, :, None, None])
        assert self.project.bias is not None
        self.project.bias.copy_(bias)
        stored = patches @ weight.T + bias
        entries = stored[coreset(stored, self.entries)]
        missing = self.entries - len(entries)  # from few images; copies of the first entry fill the memory
        self.fill(torch.cat([entries, entries[:1].expand(missing, -1)]))

    @torch.no_grad()
    def fill(self, entries: Tensor) -> None:
        """Set the entries [entries, components]."""
        linear = torch.cat([2 * entries, -entries.square().sum(1, keepdim=True)], dim=1)
        for parameter, values in zip(self.parts, torch.split(linear, CHUNK)):
            parameter.copy_(values.T)

    def _average(self, values: Tensor) -> Tensor:
        """Mean over the context, which is smaller at the border."""
        if self.context == 1:
            return values
        return F.avg_pool2d(values, self.context, 1, self.context // 2, count_include_pad=False)


@torch.inference_mode()
def coreset(patches: Tensor, count: int) -> Tensor:
    """Indices of up to ``count`` of the patches [N, D] that represent the others.

    Greedy k-centre: first the patch with the greatest distance to the mean, then always the patch with the greatest
    distance to those chosen so far.
    """
    count = min(count, len(patches))
    norms = patches.square().sum(1)
    distances = (patches - patches.mean(0)).square().sum(1)
    indices = torch.empty(count, dtype=torch.long)
    for number in range(count):
        index = int(distances.argmax())
        indices[number] = index
        new_distances = (norms + norms[index]).addmv_(patches, patches[index], alpha=-2)
        distances = new_distances if number == 0 else torch.minimum(distances, new_distances)
        distances[index] = -1  # never chosen again, even if patches are equal
    return indices


@torch.inference_mode()
def principal_components(patches: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean [D] and the first principal components [count, D] of patches [N, D]."""
    mean = patches.mean(0)
    centred = (patches - mean).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return mean, vectors.flip(1)[:, :count].T.float()


@torch.inference_mode()
def standardized_components(patches: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first principal components of standardised patches, as a linear map of the patches [N, D].

    Returns:
        The weight [count, D] and the bias [count], with which the components have mean 0.
    """
    scale = 1 / patches.std(0).clamp(min=1e-6)
    mean, vectors = principal_components(patches * scale, count)
    return vectors * scale, -(vectors @ mean)
