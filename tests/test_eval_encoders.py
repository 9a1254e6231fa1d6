"""LPIPS by its package on a network of the user's, functions of the user's, and what is said where they are absent."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError, DataError
from reasonedit.tests.pictures import draw_picture
from reasonedit.training.eval.encoders import Lpips, UserScorer, lpips_of

installed = pytest.mark.skipif(find_spec("lpips") is None, reason="lpips is not installed")


def weights(folder, net: str = "alex", name: str = "features") -> object:
    """A random network as torchvision's file would hold it."""
    from torchvision import models

    make = {"alex": models.alexnet, "squeeze": models.squeezenet1_1}[net]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = {key: value for key, value in make(weights=None).state_dict().items() if key.startswith("features.")}
    path = folder / f"{net}.pth"
    torch.save({key.replace("features", name): value for key, value in state.items()}, path)
    return path


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for number, turn in enumerate((None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180)):
        image = draw_picture(64, 48)
        (image.transpose(turn) if turn is not None else image).save(tmp_path / f"{number}.png")
        paths.append(tmp_path / f"{number}.png")
    return paths


@installed
@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_lpips_is_that_of_the_package_with_the_network_that_was_named(net, tmp_path, pictures):
    import lpips

    path = weights(tmp_path, net)
    ours = lpips_of(f"{net}={path}")
    one, two = pictures[:2]
    theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    state = torch.load(path, weights_only=True)
    for name, value in theirs.net.named_parameters():  # sliceK.N.rest is features.N.rest
        value.data = state[f"features.{name.split('.', 1)[1]}"]
    arrays = [np.asarray(Image.open(each).convert("RGB"), np.float32) for each in (one, two)]
    tensors = [torch.from_numpy(each / 127.5 - 1).permute(2, 0, 1)[None] for each in arrays]
    assert ours.distance(one, two) == pytest.approx(theirs(*tensors).item(), rel=1e-4)
    assert ours.distance(one, one) == 0 < ours.distance(one, two) == pytest.approx(ours.distance(two, one), rel=1e-5)
    assert ours.name == f"lpips-{net}:{net}.pth" and len(ours.sha256) == 64


@installed
def test_what_lpips_cannot_use_is_told(tmp_path, pictures):
    with pytest.raises(ConfigError, match="a network of alex, squeeze, vgg"):
        Lpips(tmp_path, "resnet")
    with pytest.raises(CheckpointError, match="expected a file of weights"):
        Lpips(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="as torchvision hands it out"):
        Lpips(weights(tmp_path, name="body"))
    with pytest.raises(CheckpointError, match="as torchvision hands it out"):
        Lpips(weights(tmp_path, "squeeze"), "alex")
    (tmp_path / "text.pth").write_text("none")
    with pytest.raises(CheckpointError, match="as torchvision hands it out"):
        Lpips(tmp_path / "text.pth")
    draw_picture(20, 20).save(tmp_path / "small.png")
    with pytest.raises(DataError, match="sides of 32 pixels"):
        Lpips(weights(tmp_path)).distance(tmp_path / "small.png", pictures[0])


def test_without_the_package_a_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ConfigError, match="expected the package lpips, found none. pip install lpips"):
        Lpips(tmp_path / "alex.pth")


def test_a_function_of_the_users_is_a_measure(tmp_path, pictures):
    path = tmp_path / "taste.py"
    path.write_text(
        "def brightness(path):\n    from PIL import Image\n    return Image.open(path).convert('L').getpixel((0, 0))\n"
    )
    scorer = UserScorer(f"{path}:brightness")
    assert scorer.score(pictures[0]) == Image.open(pictures[0]).convert("L").getpixel((0, 0))
    assert scorer.name == "taste:brightness" and len(scorer.sha256) == 64
    assert UserScorer("os.path:getsize").score(pictures[0]) == pictures[0].stat().st_size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing", "expected MODULE:FUNCTION"),
        ("os.path:no way", "expected MODULE:FUNCTION"),
        ("os.path:nothing", "expected a function 'nothing'"),
        ("no_such_module:f", "expected Python that can be imported"),
        ("none.py:f", "expected Python that can be imported"),
    ],
)
def test_what_is_no_function_is_told(text, words):
    with pytest.raises(ConfigError, match=words):
        UserScorer(text)


@pytest.mark.parametrize("value", ["None", "'good'", "float('nan')", "True"])
def test_a_function_that_gives_no_number_is_told(value, tmp_path):
    (tmp_path / "odd.py").write_text(f"def f(path):\n    return {value}\n")
    with pytest.raises(DataError, match="expected a finite number"):
        UserScorer(f"{tmp_path / 'odd.py'}:f").score(tmp_path)
