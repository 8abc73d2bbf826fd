"""Text rendering: the likelihood of a text by CTC, boxes, preprocessing and the error rate."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import PPOCRV5MobileDetForObjectDetection, PPOCRV5MobileRecForTextRecognition

from draftune import train
from draftune.errors import DraftuneError
from draftune.prompts import Prompt
from draftune.rewards import load_reward, parse_reward
from draftune.rewards.ocr import OCR, CharacterErrorRate, edit_distance
from draftune.rewards.ocr_models import Alphabet, reading_order, text_boxes
from draftune.utils.images import from_pil
from draftune.utils.weightless import without_weights
from helpers.errors import raises
from helpers.published_weights import photographs
from helpers.text_recognizers import CHARACTERS, detector_pixels, recognizer_pixels, save_detector, save_recognizer

BOX = (0.1, 0.25, 0.9, 0.75)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_recognizer(tmp_path_factory.mktemp("recognizer")))


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_detector(tmp_path_factory.mktemp("detector")))


def sum_over_alignments(probabilities: Tensor, characters: list[str], text: str) -> float:
    """The probability that a path, repeats and blanks removed, is the text but for spaces."""
    total = 0.0
    for path in itertools.product(range(len(characters)), repeat=len(probabilities)):
        read = "".join(characters[number] for number, _ in itertools.groupby(path) if number)
        if read.replace(" ", "") == text:
            total += float(np.prod([float(row[number]) for row, number in zip(probabilities, path, strict=True)]))
    return total


@pytest.mark.parametrize("text", ["a", "ab", "aa", "ba a"])
def test_the_score_is_the_sum_over_all_alignments(model: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two letters, the space and the blank, in five steps."""
    characters = ["blank", "a", "b", " "]
    reward = load_reward(OCR("A", BOX, model))
    assert isinstance(reward, OCR)
    reward.text, reward.alphabet = text, Alphabet(characters)

    def score(logits: Tensor) -> Tensor:
        monkeypatch.setattr(reward, "read", lambda image: logits.log_softmax(-1))
        return reward.score(torch.zeros(1, 3, 8, 8), [""])

    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    wanted = text.replace(" ", "")
    expected = np.log(sum_over_alignments(logits.detach().softmax(-1), characters, wanted)) / len(wanted)
    assert float(score(logits.detach())) == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(score, logits)


def test_scores_agree_with_the_official_processor_and_network(model: str) -> None:
    """Where the network's own softmax does not underflow, the score is that of its probabilities."""
    network = PPOCRV5MobileRecForTextRecognition.from_pretrained(model).eval()
    reward = load_reward(OCR("Open", "0 0 1 1", model))
    columns = [CHARACTERS.index(letter) for letter in "Open"]
    ours, theirs = [], []
    with torch.no_grad():
        for image in photographs():
            ours.append(float(reward(from_pil(image), [""])))
            table = network(recognizer_pixels(image)).last_hidden_state[0].double()
            spaces = [1, len(CHARACTERS) - 1]
            table[:, 0] += table[:, spaces].sum(-1)
            table[:, spaces] = 0
            # The forward variables of CTC: blanks and characters in turn.
            labels = [0, *itertools.chain(*((column, 0) for column in columns))]
            forward = torch.zeros(len(labels), dtype=torch.float64)
            forward[:2] = table[0, labels[:2]]
            for row in table[1:]:
                step = forward.clone()
                step[1:] += forward[:-1]
                step[3::2] += forward[1:-2:2]
                forward = step * row[labels]
            theirs.append(float(forward[-2:].sum().log()) / 4)
    assert np.std(theirs) > 1e-2
    assert np.abs(np.subtract(ours, theirs)).max() < 1e-3 * np.std(theirs)


def test_the_gradient_is_the_derivative_of_the_score(model: str) -> None:
    """Steps are small: the activations have kinks."""
    reward = load_reward(OCR("Open", BOX, model)).double()
    image, direction = torch.rand(2, 1, 3, 40, 120, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    image.requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(image, [""]).sum(), image)
    with torch.no_grad():
        ahead, behind = (reward.score(image + step * direction, [""]) for step in (1e-8, -1e-8))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind)[0] / 2e-8, rtol=1e-4, atol=1e-8)
    outside = torch.ones(40, 120, dtype=torch.bool)
    outside[10:30, 12:108] = False
    assert not gradient[..., outside].any()
    assert gradient[..., ~outside].any()


def test_gradient_ascent_makes_the_text_likelier(model: str) -> None:
    """From a likelihood of exp(-50) a letter to exp(-16), and to fewer errors, under a network that never saw text."""
    reward, errors = (load_reward(kind("Open", BOX, model)) for kind in (OCR, CharacterErrorRate))
    image = torch.rand(1, 3, 48, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before, errors_before = float(reward(image.detach(), [""])), float(errors(image.detach(), [""]))
    optimizer = torch.optim.Adam([image], lr=0.02)
    for _ in range(25):
        optimizer.zero_grad()
        (-reward(image.clamp(0, 1), [""]).sum()).backward()
        optimizer.step()
    final = image.detach().clamp(0, 1)
    assert before < -40
    assert float(reward(final, [""])) > 0.4 * before
    assert float(errors(final, [""])) > errors_before


def test_a_score_depends_on_its_image_and_prompt_only(model: str, detector: str) -> None:
    reward = load_reward(OCR(model=model, detector=detector))
    reward.set_chunk_size(3)
    images = torch.rand(3, 3, 64, 96)
    prompts = ['a sign that says "Open"', "a “big” mug with “cats” on it", Prompt("a poster", {"text": "Sale 50"})]
    together = reward(images, prompts)
    alone = torch.cat([reward(image[None], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    assert reward.texts(prompts) == ["Open", "bigcats", "Sale50"]
    fixed = load_reward(OCR("big cats", model=model, detector=detector))
    assert float(fixed(images[1:2], ["anything"])) == float(together[1])


def test_boxes_are_those_of_transformers_for_upright_rectangles() -> None:
    """Numbers by PPOCRV5ServerDetImageProcessor.post_process_object_detection, which needs OpenCV."""
    table = np.full((96, 160), 0.05, dtype=np.float32)
    table[10:20, 20:80] = 0.9
    table[40:50, 90:150] = 0.8
    table[42:50, 10:60] = 0.95
    table[70:90, 30:50] = 0.5  # not sure enough
    table[70:72, 100:150] = 0.9  # too thin
    found = reading_order(text_boxes(table, 192, 320))
    assert found == [(28, 8, 170, 50), (11, 75, 127, 107), (168, 68, 310, 110)]
    assert text_boxes(np.zeros((32, 32), dtype=np.float32), 64, 64) == []


def test_the_detector_reads_what_its_processor_prepares(detector: str, model: str) -> None:
    network = PPOCRV5MobileDetForObjectDetection.from_pretrained(detector).eval()
    reward = load_reward(OCR("Open", model=model, detector=detector))
    assert isinstance(reward, OCR)
    assert reward.detector is not None
    for image in [*photographs()[:4], Image.new("RGB", (1200, 500), "orange")]:
        with torch.no_grad():
            ours = reward.detector.model(pixel_values=reward.detector.pixels(from_pil(image))).last_hidden_state
            theirs = network(pixel_values=detector_pixels(image)).last_hidden_state
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_lines_are_read_one_after_the_other(model: str, detector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two lines is a blank: the same letter at the end of one and at the start of the next counts twice."""
    reward = load_reward(CharacterErrorRate("AA", model=model, detector=detector))
    assert isinstance(reward, CharacterErrorRate)
    monkeypatch.setattr(reward, "boxes", lambda image: [(0, 0, 8, 8), (8, 0, 16, 8)])
    line = torch.full((1, len(CHARACTERS)), -9.0)
    line[0, CHARACTERS.index("A")] = 0
    reward.recognizer.forward = lambda image: line  # type: ignore[method-assign]
    assert float(reward(torch.zeros(1, 3, 8, 16), [""])) == 0


def test_the_error_rate_is_the_edit_distance() -> None:
    assert [edit_distance(a, b) for a, b in [("", ""), ("", "abc"), ("abc", ""), ("kitten", "sitting")]] == [0, 3, 3, 3]
    assert edit_distance("intention", "execution") == 5


def test_what_can_not_be_scored_is_refused(model: str, detector: str) -> None:
    with raises(DraftuneError, "PP-OCRv5_mobile_rec", "model="):
        parse_reward("ocr")
    with raises(DraftuneError, "pp_ocrv5_mobile_det", "model="):
        OCR("A", BOX, detector)
    with raises(DraftuneError, "pp_ocrv5_mobile_rec", "detector="):
        OCR("A", "", model, model)
    for box in ("0.1, 0.2, 0.9", "0.5 0 0.4 1", "0 0 1 1.5", "a b c d", "0 0 nan 1"):
        with raises(DraftuneError, "box", box):
            OCR("A", box, model)
    with raises(DraftuneError, "'é'"):
        OCR("Café", BOX, model)
    reward = OCR("", BOX, model)
    with raises(DraftuneError, "a sign", "text="):
        reward.check(["a sign"])
    with raises(DraftuneError, "'?'"):
        reward.check(['a sign that says "Why?"'])
    long = load_reward(OCR("A" * 21, BOX, model))
    with raises(DraftuneError, "21", "40", "41", "box="):
        long(torch.rand(1, 3, 32, 32), [""])


def test_a_dictionary_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = save_recognizer(tmp_path)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"character_list": CHARACTERS[:-1]}))
    with raises(DraftuneError, "character_list", str(len(CHARACTERS))):
        OCR("A", BOX, str(folder))


def test_it_is_built_from_its_configs(model: str, detector: str) -> None:
    with without_weights() as mode:
        for reward in (OCR("Open", BOX, model), OCR("Open", "", model, detector)):
            load_reward(reward)
            assert {type(p.data).__name__ for p in reward.parameters()} == {"FakeTensor"}
            with mode:
                assert reward(torch.rand(1, 3, 64, 64), [""]).shape == (1,)


def test_a_text_trains_the_embedded_model(model: str, tmp_path: Path) -> None:
    reward = f"ocr(text=A1, box='0 0.25 1 0.75', model={json.dumps(model)})"
    settings = {"steps": 3, "num_inference_steps": 2, "batch_size": 2, "log_images_steps": 0, "eval_prompts": ""}
    result = train("emoji", reward, prompts=["pizza", "sun"], output=str(tmp_path / "run"), **settings)
    assert all(row["grad_norm"] > 0 for row in result.metrics)
    assert result.metrics[0]["reward"] != result.metrics[-1]["reward"]
