"""Memories of good patches inside the graph, a bank for each class.

After PatchCore (Roth et al., CVPR 2022, arXiv 2106.08265), with two changes: the bank of the nearest class is searched
instead of one for all, and distances are measured in units of how far good patches usually lie from the bank.
"""

from collections.abc import Iterable, Sequence
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CANDIDATES = 20_000
"""Patches of good images that stand for all of them. Every image contributes the same number."""
MOST_SQUARE = 16
"""Upper limit of the square of an entry."""
BLOCK = 256
"""Patches among which ``coreset`` chooses before it computes all distances again."""
APART = 5
"""Of so many images of a class, one shows how far good patches usually lie from the others."""
COMPARED = 313
"""Entries that it is compared with, a quarter of the default bank: as many for every size, so that a bank begins with
all smaller ones."""
LEAST_WHITENED = 4
"""Images of a class that show it. Of two, their own difference would count less than that of new images: of two images
of each development class this gave false-positive rates of 0.60 and 0.53 (two seeds), and 0.36 and 0.20 without."""
LEAST_SPREAD = 0.001
"""Lower limit of the spread of a channel, relative to the mean of all channels."""
LEAST_RESIDUAL = 1e-4
"""Lower limit of the variance of residuals in a direction, relative to the mean over all directions."""


class PatchMemory(nn.Module):
    """Distance of each patch to the nearest entry of a bank: patches [N, C, h, w], classes [N] -> [N, 1, h, w].

    A class is a row of three tables. ``weight`` and
    ``bias`` map a patch to its components z, the last of which is always 1. An entry of ``bank`` has the components c
    and, last, -|c|^2 / 2, because min |z - c|^2 is |z|^2 - 2 max (z.c - |c|^2 / 2): a matrix product and a maximum,
    which are fast in every runtime. The components of entries are within -1..1, and |c|^2 is at most ``MOST_SQUARE``,
    so that codes of 8 bits suit all banks.

    Args:
        classes: number of rows.
        channels: C.
        components: number of components.
        entries: size of a bank.
    """

    rows = ("weight", "bias", "bank")

    def __init__(self, classes: int, channels: int, components: int, entries: int) -> None:
        super().__init__()
        size = min(channels, components) + 1
        self.weight = nn.Parameter(torch.zeros(classes, channels, size), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(classes, 1, size), requires_grad=False)
        self.bank = nn.Parameter(torch.zeros(classes, size, entries), requires_grad=False)

    def forward(self, patches: Tensor, nearest: Tensor) -> Tensor:
        weight, bias, bank = (table.index_select(0, nearest) for table in (self.weight, self.bias, self.bank))
        z = patches.flatten(2).transpose(1, 2) @ weight + bias
        return distances(z, z @ bank, 1.0).view(-1, 1, *patches.shape[2:])

    @torch.no_grad()
    def fit(self, row: int, patches: Tensor, images: Tensor) -> None:
        """Set the row of a class, in place.

        Args:
            patches: of good images, [n, C].
            images: for each patch the number of its image, [n]. One image in ``APART`` shows how far good patches
                usually lie from a bank of the others. Held-out images cannot show it: they would lie nearer than new
                images do, and the threshold would be too low.
        """
        weight, bias = standardized_components(patches, self.bank.shape[1] - 1)
        z, apart = patches @ weight.T + bias, (images % APART == 1) & (images.max() >= LEAST_WHITENED - 1)
        entries = z[~apart][coreset(z[~apart], COMPARED)]
        transform = whitening(z[apart], entries)
        weight, bias, z = transform @ weight, transform @ bias, z @ transform.T
        self._store(row, weight, bias, z[coreset(z, self.bank.shape[2])], z)

    @torch.no_grad()
    def extend(self, row: int, patches: Tensor) -> float:
        """Let the bank of a class represent these patches [n, C], too, in place.

        Returns:
            The factor of all its distances, since the unit of the bank may change.
        """
        weight, bias = self.weight[row, :, :-1].T, self.bias[row, 0, :-1]
        entries = torch.cat([self.bank[row, :-1].T, patches @ weight.T + bias])
        return self._store(row, weight, bias, entries[coreset(entries, self.bank.shape[2])], entries)

    @torch.no_grad()
    def fill(self, row: int, patches: Tensor) -> None:
        """Set the bank of a class from these patches [n, C], in place; they are projected as the row says."""
        z = patches @ self.weight[row, :, :-1] + self.bias[row, :, :-1]
        self._set_entries(row, z[coreset(z, self.bank.shape[2])])

    def _store(self, row: int, weight: Tensor, bias: Tensor, entries: Tensor, z: Tensor) -> float:
        """Set a row from a projection and entries, in a unit in which all ``z`` are in range: the factor to it."""
        unit: float = max(float(z.abs().max()), float(z.square().sum(1).max() / MOST_SQUARE) ** 0.5, 1e-12)
        weight, bias, entries = weight / unit, bias / unit, entries / unit
        size = len(weight)
        self.weight[row, :, :size] = weight.T
        self.bias[row, 0, :size], self.bias[row, 0, -1] = bias, 1
        self._set_entries(row, entries)
        return 1 / unit

    def _set_entries(self, row: int, entries: Tensor) -> None:
        count, size = entries.shape
        self.bank[row, :size, :count], self.bank[row, -1, :count] = entries.T, entries.square().sum(1) / -2
        self.bank[row, :, count:] = self.bank[row, :, :1]  # from few patches; copies of the first entry fill the bank


def distances(z: Tensor, products: Tensor, constant: float) -> Tensor:
    """Of components z [N, L, K] to the nearest of the entries whose products with them are [N, L, n]: [N, L].

    Args:
        constant: the square of the components in which an entry holds -|c|^2 / 2.
    """
    # The sums in float32, also if the products are in fp16.
    squared: Tensor = z.float().square().sum(2) - constant - 2 * products.amax(2).float()
    return squared.clamp(min=0).sqrt()


@torch.inference_mode()
def whitening(queries: Tensor, entries: Tensor) -> Tensor:
    """A linear map [D, D] after which the residuals of good patches are more alike in all directions.

    The residual of a query is its difference from the nearest entry. A direction whose residuals have the variance v,
    of mean m over all directions, is scaled by (m / v)^(1/4): half way, on a logarithmic scale, to distances in
    standard deviations.

    Args:
        queries: components of good patches [m, D], which are not in the bank. If there are none, nothing is known, and
            the map is the identity.
        entries: of the bank [n, D].
    """
    nearest = torch.cat([torch.cdist(part, entries).argmin(1) for part in torch.split(queries, 1024)])
    residuals = (queries - entries[nearest]).double()
    if not residuals.any():
        return torch.eye(entries.shape[1])
    variances, directions = torch.linalg.eigh(residuals.T @ residuals / len(residuals))
    mean = variances.mean()
    scales = (mean / variances.clamp(min=LEAST_RESIDUAL * float(mean))) ** 0.25
    transform: Tensor = (directions * scales) @ directions.T
    return transform.float()


@torch.inference_mode()
def coreset(patches: Tensor, count: int) -> Tensor:
    """Indices of up to ``count`` of the patches [N, D] that represent the others.

    Greedy k-centre: first the patch with the greatest distance to the mean, then always the patch with the greatest
    distance to those chosen so far. So the first n of more are those of n.

    Distances only fall while patches are chosen. So, among the ``BLOCK`` patches that are farthest away, the choice
    goes on without a look at the others until the greatest distance is no longer above theirs. This takes a third of
    the time.
    """
    count = min(count, len(patches))
    norms = patches.square().sum(1)
    chosen = [int((patches - patches.mean(0)).square().sum(1).argmax())]
    distances = torch.full((len(patches),), torch.inf)
    new = chosen
    while len(chosen) < count:
        centres = patches[new]
        torch.minimum(distances, (norms[:, None] + norms[new] - 2 * patches @ centres.T).amin(1), out=distances)
        distances[chosen] = -1  # never chosen again, even if patches are equal
        far, places = distances.topk(min(BLOCK + 1, len(patches)))
        limit = float(far[-1]) if len(far) > BLOCK else -torch.inf
        places, far, new = places[:BLOCK], far[:BLOCK], []
        block = patches[places]
        apart = norms[places][:, None] + norms[places] - 2 * block @ block.T
        while len(chosen) + len(new) < count:
            place = int(far.argmax())
            if new and float(far[place]) <= limit:
                break
            new.append(int(places[place]))
            far = torch.minimum(far, apart[place])
            far[place] = -2
        chosen += new
    return torch.tensor(chosen[:count])


@torch.inference_mode()
def sample_patches(features: Tensor, count: int, generator: torch.Generator, inside: Optional[Tensor] = None) -> Tensor:
    """``count`` random patches of each of the feature maps [N, C, h, w], or all in order if there are fewer: [n, C].

    Args:
        inside: bool [h, w], the positions to choose from; all if None.
    """
    patches = features.flatten(2).transpose(1, 2)
    places = torch.arange(patches.shape[1]) if inside is None else inside.flatten().nonzero().flatten()
    if count >= len(places):
        return patches[:, places].flatten(0, 1)
    return torch.cat([one[places[torch.randperm(len(places), generator=generator)[:count]]] for one in patches])


def sample_all(batches: Iterable[Sequence[Tensor]], images: int, seed: int, roi: Optional[Tensor] = None
               ) -> list[Tensor]:
    """For each of several feature maps, about ``CANDIDATES`` patches of all ``images`` in the batches: [n, C] each.

    Args:
        roi: of the class, bool [h, w]; patches that do not reach into it are left out.
    """
    generator, each = torch.Generator().manual_seed(seed), max(1, CANDIDATES // images)
    parts = [[sample_patches(one, each, generator, roi if roi is None else reaching_into(roi, one)) for one in features]
             for features in batches]
    return [torch.cat(part) for part in zip(*parts)]


def reaching_into(roi: Tensor, features: Tensor) -> Tensor:
    """The positions of feature maps [N, C, h, w] on which cells in a region of interest depend: bool [H, W] -> [h, w].

    Where a feature map is coarser than the anomaly map, its distances are enlarged, and neighbours of the region count.
    """
    size = features.shape[2:]
    inside = F.adaptive_max_pool2d(roi[None, None].float(), size)
    if size != roi.shape:
        inside = F.max_pool2d(inside, 3, 1, 1)
    return inside[0, 0] > 0


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
    spreads = patches.std(0)
    # A channel that is dead on good patches must not drown the others, nor overflow, on patches that activate it.
    scale = 1 / spreads.clamp(min=LEAST_SPREAD * float(spreads.mean()) + 1e-6)
    mean, vectors = principal_components(patches * scale, count)
    return vectors * scale, -(vectors @ mean)
