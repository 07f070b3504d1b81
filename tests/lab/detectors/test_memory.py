"""Banks by class, in one pass, and what is no bank."""

import pytest
import timm
import torch

from uadtool.data.dataset import scoring_samples, training_samples
from uadtool.errors import UadtoolError
from uadtool.lab.detectors import patch_memory
from uadtool.lab.detectors.memory import Memory
from uadtool.lab.detectors.patch_memory import PatchMemory
from uadtool.lab.train import TrainingOptions, train
from uadtool.lab.training.data import read_images
from uadtool.metadata import Reading

TEACHER, SIZE = "test_resnet", (64, 64)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A state dict of the teacher, and the file to save it in."""
    torch.manual_seed(0)
    return timm.create_model(TEACHER).state_dict(), tmp_path_factory.mktemp("weights") / "teacher.pth"


@pytest.fixture
def run(weights, tmp_path):
    state, file = weights
    torch.save(state, file)

    def run(samples, **options):
        chosen = TrainingOptions(teacher=TEACHER, teacher_weights=str(file), image_size=SIZE, **options)
        return train(samples, chosen, tmp_path / "checkpoint")

    return run


@pytest.mark.parametrize(("options", "message"), [
    ({"entries": 0}, "the option entries must be at least 1, not 0"),
    ({"components": 0}, "the option components must be at least 1, not 0"),
    ({"strides": "8,4"}, "the option strides must be some of 4,8,16,32, ascending, not '8,4'"),
    ({"strides": "4,4"}, "the option strides must be some of"),
    ({"strides": "3"}, "the option strides must be some of"),
    ({"strides": ""}, "the option strides must be some of"),
])
def test_options_out_of_range(options, message):
    with pytest.raises(UadtoolError, match=f"^{message}"):
        Memory(TEACHER, SIZE, 2, **options)


def test_a_training_takes_no_steps(run, textures):
    with pytest.raises(UadtoolError, match=r"^memory learns in one pass over the images; leave out --steps and"):
        run(training_samples(str(textures)), steps=3)


def test_features_that_are_no_numbers(run, textures, weights):
    state, file = weights
    name = next(iter(state))
    torch.save({**state, name: torch.full_like(state[name], 3e38)}, file)
    with pytest.raises(UadtoolError, match=r"^the teacher's features are not all finite numbers; check its weights$"):
        run(training_samples(str(textures)))


def test_the_class_decides_what_is_normal(run, textures):
    """Images of one class are anomalies in the bank of the other."""
    detector = run(training_samples(str(textures)), method_options={"entries": "300"}).detector
    images = read_images([sample for sample in scoring_samples([str(textures)])
                          if (sample.class_name, sample.label) == ("dots", "good")], Reading(SIZE), 1)
    with torch.inference_mode():
        pixels = detector.normalize(images)
        own, other = (detector.raw_maps(pixels, detector.features(pixels), torch.full((len(images),), row)).mean()
                      for row in (0, 1))
    assert own < 0.5 * other


def test_a_class_does_not_change_with_the_other_classes(run, textures):
    samples = training_samples(str(textures))
    both = run(samples).detector
    one = run([sample for sample in samples if sample.class_name == "stripes"]).detector
    for memory_of_both, memory_of_one in zip(both.memories, one.memories):
        assert torch.equal(memory_of_both.bank[1], memory_of_one.bank[0])
        assert torch.equal(memory_of_both.weight[1], memory_of_one.weight[0])


def test_patches_of_a_class_are_bounded_however_many_images_it_has(run, textures, monkeypatch):
    seen = []
    monkeypatch.setattr(patch_memory, "CANDIDATES", 100)
    fit = PatchMemory.fit
    monkeypatch.setattr(PatchMemory, "fit", lambda self, row, patches, images: (
        seen.append((len(patches), images.unique().tolist())), fit(self, row, patches, images))[1])
    run(training_samples(str(textures)))
    assert {count for count, _ in seen} == {6 * 16}
    assert all(images == list(range(16)) for _, images in seen)
