"""`demo.py`: an image file in; class, spikes, a picture and an animation out."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

import mpisjax
from mpisjax import nn
from mpisjax.cli import demo
from mpisjax.configuration import makers
from mpisjax.cpu import cores
from mpisjax.data import prepare_images
from mpisjax.errors import UserError
from mpisjax.pretrained import familiar
from mpisjax.pretrained.images import read_image
from mpisjax.pretrained.ink import thicken
from mpisjax.pretrained.trace import running_rates, trace
from mpisjax.training import devices

pytestmark = pytest.mark.unoptimized

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def digits():
    trained = mpisjax.load_pretrained("digits")
    return trained, makers.make_dataset(trained.config).test


def run(monkeypatch, capsys, *arguments: object) -> str:
    monkeypatch.setattr(cores, "prepare", lambda all_cores: None)  # this process has computed already
    monkeypatch.setattr(devices, "compilation_cache", lambda: "")
    demo.main([*map(str, arguments)])
    return capsys.readouterr().out


def large_page(image: np.ndarray) -> Image.Image:
    """A digit as one would photograph it: dark on a light, coloured page, off centre."""
    big = Image.fromarray(255 - image[:, :, 0]).resize((160, 160), Image.Resampling.BICUBIC)
    page = Image.new("RGB", (400, 260), (236, 231, 220))
    page.paste(Image.merge("RGB", [big.point(lambda v: v * 0.9)] * 3), (190, 60))
    return page


@pytest.mark.slow
def test_a_digit_is_classified_and_drawn(digits, monkeypatch, capsys, tmp_path):
    trained, test = digits
    Image.fromarray(test.images[5][:, :, 0]).save(tmp_path / "digit.png")
    said = run(
        monkeypatch,
        capsys,
        tmp_path / "digit.png",
        "--out",
        tmp_path / "out",
        "--live",
        "--num_steps",
        6,
        "--confidence",
        1,
    )
    found = trace(trained, test.images[5], 6)
    assert f"class: {test.labels[5]}, confidence {100 * found.scores[-1].max():.1f}% after 6 of 6 steps" in said
    assert f"best classes: {test.labels[5]} " in said
    assert f"spent: {found.spikes_until(6):,} spikes of 2,560 neurons, " in said
    assert "unlike the training data" not in said
    assert "step 6 of 6" in said and "stream2/layer2" in said  # the terminal's last frame
    with Image.open(tmp_path / "out.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width < 520 and picture.height > 1000  # one column, for a phone
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50
    with Image.open(tmp_path / "out.gif") as film:
        assert film.n_frames == 6 and film.info["loop"] == 0
        looks = []
        for number in range(6):
            film.seek(number)
            looks.append(np.asarray(film.convert("L"), int))
        changes = [np.abs(a - b).sum() for a, b in itertools.pairwise(looks)]
        assert min(changes) > 0  # every step draws something


def test_a_trace_is_what_evaluation_computes(digits):
    trained, test = digits
    neuron = makers.make_neuron(trained.config)
    found = trace(trained, test.images[0])
    x = prepare_images(jnp.asarray(test.images[:1]), trained.inputs)
    forward = makers.make_spike_forward(trained.config)
    simulation = nn.spikes(trained.net, trained.variables, x, neuron=neuron, forward=forward)
    assert found.scores.shape == (16, 10)
    for name, spikes in simulation.spike_counts.items():
        assert abs(found.spikes[name].sum() - spikes.sum()) <= 2  # two programs may round a current differently
        assert found.rates[name][-1] == pytest.approx(float(simulation.layer_rates[name].mean()), abs=1e-3)
    logits = trained.apply(trained.variables, test.images[:1]).logits[0]
    wanted = np.exp(logits - np.max(logits))
    np.testing.assert_allclose(found.equivalent, wanted / wanted.sum(), atol=0.02)
    np.testing.assert_allclose(found.scores.sum(1), 1, rtol=1e-5)


def test_running_rates():
    spikes = np.array([[1, 0], [0, 0], [1, 1]], bool)
    np.testing.assert_allclose(running_rates(spikes, 1.0), [[1, 0], [1 / 2, 0], [2 / 3, 1 / 3]])
    weight = 1 + 0.5 + 0.25
    np.testing.assert_allclose(running_rates(spikes, 0.5)[-1], [1.25 / weight, 1 / weight])


def test_images_of_the_right_size_are_taken_as_they_are(digits, tmp_path):
    trained, test = digits
    image = test.images[3]
    Image.fromarray(image[:, :, 0]).save(tmp_path / "a.png")
    found, done = read_image(tmp_path / "a.png", trained.inputs)
    np.testing.assert_array_equal(found, image)
    assert done == []
    Image.merge("RGB", [Image.fromarray(255 - image[:, :, 0])] * 3).save(tmp_path / "b.png")
    found, done = read_image(tmp_path / "b.png", trained.inputs)
    np.testing.assert_array_equal(found, image)
    assert done == ["inverted, since its background is light"]


def test_photographs_are_cropped_turned_dark_and_scaled(digits, tmp_path):
    """Twenty digits on pages, as JPEG: nearly all keep the class that the pretrained network gives the original."""
    trained, test = digits
    images = []
    for number in range(20):
        large_page(test.images[number]).save(tmp_path / "page.jpg", quality=92)
        image, done = read_image(tmp_path / "page.jpg", trained.inputs)
        assert image.shape == (8, 8, 1) and image.dtype == np.uint8
        words = ", ".join(done)
        assert re.fullmatch(
            r"made grey, inverted, .*, freed of uneven light, stretched to full contrast, "
            r"(its thin lines drawn thicker, )?cropped to its content of \d+ x \d+, scaled from \d+ x \d+ to 8 x 8",
            words,
        )
        images.append(image)
    logits = trained.apply(trained.variables, np.stack(images)).logits
    assert np.mean(np.argmax(logits, -1) == test.labels[:20]) >= 0.8


def lit(image: Image.Image, kind: str, rng: np.random.Generator) -> Image.Image:
    """A page in uneven light, with a camera's noise."""
    pixels = np.asarray(image.convert("L"), float)
    height, width = pixels.shape
    y, x = np.meshgrid(np.linspace(-0.5, 0.5, height), np.linspace(-0.5, 0.5, width), indexing="ij")
    light = {
        "from a side": 1 + 0.9 * x,
        "fading to the corners": 1 - 1.2 * (x**2 + y**2),
        "with a shadow": np.where(x + 0.4 * y > 0.12, 0.55, 1.0),
    }[kind]
    return Image.fromarray(np.clip(pixels * light + rng.normal(0, 3, pixels.shape), 0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("kind", "least"), [("from a side", 0.85), ("fading to the corners", 0.85), ("with a shadow", 0.7)]
)
def test_uneven_light_is_evened(digits, tmp_path, kind, least):
    """Without that, none of these keeps more than a fifth of its answers."""
    trained, test = digits
    rng, images = np.random.default_rng(0), []
    for number in range(20):
        lit(large_page(test.images[number]), kind, rng).save(tmp_path / "page.png")
        images.append(read_image(tmp_path / "page.png", trained.inputs)[0])
    assert np.mean(trained.predict(np.stack(images)).labels == test.labels[:20]) >= least


@pytest.mark.parametrize("paper", [20, 128, 235])
@pytest.mark.parametrize("name", ["digits", "fashion_mnist"])
def test_blank_pages_are_refused(paper, name, tmp_path):
    inputs, rng = mpisjax.load_pretrained(name).inputs, np.random.default_rng(0)
    blank = Image.new("L", (300, 200), paper)
    pages = [blank, lit(blank, "from a side", rng), blank.resize(inputs.shape[:2])]
    if name == "digits":
        pages.append(lit(blank, "fading to the corners", rng))
    for number, page in enumerate(pages):
        page.save(tmp_path / f"{number}.png")
        with pytest.raises(UserError, match=rf"{number}.png is blank: nothing in it stands out"):
            read_image(tmp_path / f"{number}.png", inputs)


def test_printed_digits_are_drawn_thicker_and_mostly_right(digits, tmp_path):
    trained, _ = digits
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images, words = [], ""
    for name in ("DejaVuSans-Bold", "DejaVuSans", "DejaVuSerif", "cmtt10", "STIXGeneral"):
        font = ImageFont.truetype(str(fonts / f"{name}.ttf"), 120)
        for digit in range(10):
            page = Image.new("L", (200, 200), 235)
            ImageDraw.Draw(page).text((60, 20), str(digit), fill=30, font=font)
            page.save(tmp_path / "a.png")
            image, done = read_image(tmp_path / "a.png", trained.inputs)
            images.append(image)
            words += ", ".join(done)
    right = trained.predict(np.stack(images)).labels.reshape(5, 10) == np.arange(10)
    assert right.mean() >= 0.8 and words.count("thin lines drawn thicker") > 20


def test_a_thin_line_becomes_as_wide_as_wanted():
    drawn = np.zeros((100, 60), np.float32)
    drawn[:, 28:32] = 1
    wide = thicken(drawn, 0.2)
    assert 17 <= (wide[wide.shape[0] // 2] > 0.5).sum() <= 23
    np.testing.assert_array_equal(thicken(drawn, 0.02), drawn)


def test_what_is_unlike_the_training_data_is_said(digits, monkeypatch, capsys, tmp_path):
    trained, test = digits
    rng = np.random.default_rng(0)
    strange = np.concatenate(
        [rng.integers(0, 256, (20, 8, 8, 1)), 255 - test.images[:20], np.rot90(test.images[:20], axes=(1, 2))]
    ).astype(np.uint8)
    assert (trained.predict(strange).novelty > 1).mean() > 0.95
    assert (trained.predict(test.images).novelty > 1).mean() < 0.03
    Image.fromarray(strange[0, :, :, 0]).save(tmp_path / "noise.png")
    said = run(monkeypatch, capsys, tmp_path / "noise.png", "--no_gif", "--out", tmp_path / "out")
    assert "This image is unlike the training data of digits" in said and "Do not trust the answer." in said
    assert (tmp_path / "out.png").exists() and not (tmp_path / "out.gif").exists()


def test_the_region_of_training_data_is_kept_by_a_card(digits):
    trained, test = digits
    found = trained.familiar
    again = familiar.Familiar.from_card(json.loads(json.dumps(found.to_card())))
    rates = familiar.channel_rates(
        trained.variables, test.images[:9], net=trained.net, inputs=trained.inputs, neuron=trained.neuron
    )
    np.testing.assert_allclose(again.novelty(np.asarray(rates)), found.novelty(np.asarray(rates)))
    # A point along an axis, and one off all axes, against the definition.
    made_up = familiar.Familiar(np.zeros(3), np.eye(3)[:1], np.array([2.0]), 0.5, 4.0)
    np.testing.assert_allclose(made_up.novelty(np.array([[4.0, 0, 0], [0, 0, 3.0]])), [0.5, 1.5])
    older = trained._replace(card={key: value for key, value in trained.card.items() if key != "familiar"})
    assert older.familiar is None and np.isnan(older.predict(test.images[:2]).novelty).all()


def test_a_network_for_a_users_own_images_reads_them_as_in_training(digits, tmp_path):
    """No background is looked for: training did not look for one either."""
    inputs = digits[0].inputs._replace(name="folder")
    wide = np.full((20, 40), 200, np.uint8)
    wide[5:15, 10:30] = 40
    Image.fromarray(wide).save(tmp_path / "a.png")
    image, done = read_image(tmp_path / "a.png", inputs)
    assert done == ["letterboxed from 40 x 20 to 8 x 8"] and image[0].max() == 0 and image[4, 0] > 150
    image, done = read_image(tmp_path / "a.png", inputs, fit="crop")
    assert done == ["cropped from 40 x 20 to 8 x 8"] and image[0, 0] > 150
    with pytest.raises(UserError, match="there is no image"):
        read_image(tmp_path / "absent.png", inputs)


def deeper(image: np.ndarray, mode: str) -> Image.Image:
    """A digit with dark ink on white paper, in pixels of more than 8 bits."""
    paper = (255 - image[:, :, 0]).astype(np.float64) / 255
    if mode == "16 bits":
        return Image.fromarray(np.rint(65535 * paper).astype(np.uint16))
    if mode == "12 of 16 bits":
        return Image.fromarray(np.rint(4095 * paper).astype(np.uint16))
    if mode == "32 bits":
        return Image.fromarray(np.rint(1e6 * paper).astype(np.int32))
    return Image.fromarray((paper if mode == "floats" else 900 * paper - 100).astype(np.float32))


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("16 bits", "the range of 16 bits, 0 to 65535"),
        ("12 of 16 bits", "its own range, 0 to 4095"),
        ("32 bits", "its own range, 0 to 1e+06"),
        ("floats", "the range of floats, 0 to 1"),
        ("floats of any size", "its own range, -100 to 800"),
    ],
)
def test_pixels_of_more_than_8_bits_are_scaled_by_their_range(digits, tmp_path, mode, said):
    trained, test = digits
    image = test.images[3].copy()
    image[0, 0], image[0, 1] = 0, 255  # the whole range occurs
    kind = "tiff" if mode in ("32 bits", "floats", "floats of any size") else "png"
    deeper(image, mode).save(tmp_path / f"a.{kind}")
    found, done = read_image(tmp_path / f"a.{kind}", trained.inputs)
    assert done[0] == f"scaled to 8 bits from {said}"
    np.testing.assert_allclose(found.astype(int), image, atol=1)
    assert len(np.unique(found)) > 5  # nothing is clipped


def test_pixels_that_are_no_numbers_are_told(digits, tmp_path):
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="no finite numbers"):
        read_image(tmp_path / "a.tiff", digits[0].inputs)


def test_transparency_colour_and_empty_images(digits, tmp_path):
    trained, _ = digits
    ink = Image.new("RGBA", (50, 50), (0, 0, 0, 0))
    ink.paste((0, 0, 0, 255), (20, 5, 30, 45))
    ink.save(tmp_path / "ink.png")
    image, done = read_image(tmp_path / "ink.png", trained.inputs)
    assert done[0] == "put on white where it was transparent" and "inverted" in done[1]
    assert image[:, 3:5].min() == 255 and image[:, :2].max() == image[:, 6:].max() == 0  # a bar in the middle
    plain, _ = read_image(tmp_path / "ink.png", trained.inputs, crop=False)
    assert plain[0].max() < 255  # the margin is still there
    coloured = trained.inputs._replace(name="cifar10", shape=(16, 16, 3))
    Image.new("RGB", (60, 30), (10, 200, 30)).save(tmp_path / "wide.png")
    image, done = read_image(tmp_path / "wide.png", coloured)
    assert (image == (10, 200, 30)).all() and image.shape == (16, 16, 3)
    assert done == ["cropped to the square in its middle", "scaled from 30 x 30 to 16 x 16"]


def test_what_is_no_image_is_told(digits, tmp_path):
    trained, _ = digits
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "none.png").write_bytes(b"")
    for name in ("cut.png", "text.png", "none.png", "."):
        with pytest.raises(UserError, match="cannot be read as an image"):
            read_image(tmp_path / name, trained.inputs)
    with pytest.raises(UserError, match="there is no image"):
        read_image(tmp_path / "absent.png", trained.inputs)
    with pytest.raises(UserError, match="reads event frames"):
        read_image(whole, mpisjax.load_pretrained("saccade_digits").inputs)


def test_the_program_says_one_sentence_and_writes_nothing(python, tmp_path):
    done = python(ROOT / "demo.py", "absent.png", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == "error: there is no image absent.png; name a PNG or JPEG file\n"
    assert not done.stdout and not list(tmp_path.iterdir())
