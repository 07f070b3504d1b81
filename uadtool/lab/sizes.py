"""Sizes: a bank begins with all smaller ones, so one file holds detectors of several sizes.

Only the statistics of maps and scores differ, and each size has its own: with those of another, nearly every image
would be above the threshold.
"""

from collections.abc import Callable

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.contract import STATISTICS
from uadtool.lab.rows import Model, rebuilt
from uadtool.metadata import Metadata


def at_size(model: Model, entries: int) -> Model:
    """The model with banks of the first ``entries`` entries, one of its sizes; its tensors are views.

    Raises:
        UadtoolError: the model does not have this size.
    """
    found = {one.options.get("entries"): one for one in (*model.metadata.smaller(), model.metadata)}
    if entries not in found:
        raise UadtoolError(f"{model.path} has no size {entries}; it has {_listed(model.metadata)}; train --sizes makes "
                           "others")
    metadata = found[entries]
    if metadata is model.metadata:
        return model
    kept = {f"sizes.{one['entries']}" for one in metadata.sizes}
    tensors = {name: tensor for name, tensor in model.module.state_dict().items()
               if not name.startswith("sizes.") or name.rpartition(".")[0] in kept}
    for name, tensor in tensors.items():
        if name.endswith(".bank"):
            tensors[name] = tensor[:, :, :entries]
    for name in STATISTICS:
        tensors[name] = model.module.get_buffer(f"sizes.{entries}.{name}")
    return rebuilt(model, tensors, metadata)


def fit_every_size(model: Model, fit: Callable[[Model], Metadata]) -> Model:
    """Set the statistics and thresholds of every size of a model.

    Args:
        fit: sets the statistics of a model in place, and returns its metadata with thresholds. The whole banks come
            last.
    """
    smaller = []
    for one in model.metadata.smaller():
        entries = one.options["entries"]
        small = at_size(model, entries)
        smaller.append(fit(small))
        for name in STATISTICS:
            model.module.get_buffer(f"sizes.{entries}.{name}").copy_(small.module.get_buffer(name))
    return model._replace(metadata=fit(model).with_smaller(smaller))


def _listed(metadata: Metadata) -> str:
    return ", ".join(str(one.options.get("entries", "one size only")) for one in (*metadata.smaller(), metadata))
