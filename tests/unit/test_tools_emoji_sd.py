"""The scripts that make emoji-sd: lists, captions, the code of pictures, exact resume, the arithmetic of the gate."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools" / "emoji_sd"
NAMES = {file.stem for file in TOOLS.glob("*.py")}


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    """The scripts import each other by plain names, which must not stay behind."""
    monkeypatch.syspath_prepend(str(TOOLS))
    before = {name: sys.modules.pop(name) for name in NAMES & sys.modules.keys()}
    yield
    for name in NAMES & sys.modules.keys():
        del sys.modules[name]
    sys.modules.update(before)


def test_what_is_held_out_is_not_trained_on():
    import lists
    from sheet import PROMPTS

    assert len(set(lists.SUBJECTS)) == len(lists.SUBJECTS) == 400
    assert not set(lists.SUBJECTS) & set(lists.HELD_OUT_SUBJECTS)
    seen = {*lists.STYLES.values(), *lists.AUTOENCODER_STYLES.values()}
    assert not seen & set(lists.HELD_OUT_STYLES.values())
    assert len(lists.SHOWN_IN_STYLE) == 50
    assert len(lists.ASKED_IN_STYLE) == 64
    assert not set(lists.SHOWN_IN_STYLE) & set(lists.ASKED_IN_STYLE)
    assert {*lists.SHOWN_IN_STYLE, *lists.ASKED_IN_STYLE} <= set(lists.SUBJECTS)
    assert len(PROMPTS) == 10


def test_captions_carry_style_and_name_and_are_empty_one_time_in_ten():
    from captions import caption

    chance = random.Random(0)
    drawn = [caption("automobile", "noto", chance) for _ in range(4000)]
    assert drawn.count("") / 4000 == pytest.approx(0.1, abs=0.02)
    plain = [text for text in drawn if text in ("noto automobile", "noto car", "noto red car")]
    assert len(plain) / 4000 == pytest.approx(0.75 * 0.4, abs=0.03)
    names = {"automobile", "car", "red car"}
    assert all(text == "" or any(text.endswith(name) for name in names) for text in drawn)


def test_six_captions_in_ten_begin_with_words_that_say_nothing():
    from captions import FILLERS, caption

    chance = random.Random(0)
    drawn = [text for text in (caption("bus", "noto", chance) for _ in range(4000)) if text]
    begun = [text.removesuffix("noto bus").removesuffix("bus").strip() for text in drawn]
    assert sum(words != "" for words in begun) / len(drawn) == pytest.approx(0.6, abs=0.03)
    assert set(FILLERS) < set(begun)
    letters = [words for words in begun if words and words not in FILLERS]
    assert all(words.removesuffix(",").isalpha() and len(words.removesuffix(",")) <= 3 for words in letters)
    assert 0.4 < sum(words.endswith(",") for words in letters) / len(letters) < 0.6


def test_a_word_of_no_caption_comes_to_mean_as_little_as_those_that_say_nothing():
    from build import neutralise
    from captions import FILLERS
    from model import text_encoder
    from train import caption_tokenizer

    tokenizer = caption_tokenizer()
    model = text_encoder(tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    neutralise(model, tokenizer)
    after = model.get_input_embeddings().weight.detach()
    ids = tokenizer(list(FILLERS), add_special_tokens=False).input_ids
    mean = np.mean([before[token].double().numpy() for token in {token for row in ids for token in row}], axis=0)
    (unread,) = tokenizer("lineart", add_special_tokens=False).input_ids
    np.testing.assert_allclose(after[unread].numpy(), mean, atol=1e-6)
    for word in ("noto", "heart", "car", "picture", ","):
        (read,) = tokenizer(word, add_special_tokens=False).input_ids
        assert torch.equal(after[read], before[read])


def test_every_prompt_is_words_that_captions_have():
    from captions import ALIASES, name_of
    from lists import SUBJECTS
    from sheet import PROMPTS

    known = {name_of(subject) for subject in SUBJECTS} | {alias for names in ALIASES.values() for alias in names}
    assert set(PROMPTS) <= known


def test_a_word_of_the_captions_is_one_token_and_another_word_is_spelt():
    from captions import tokenizer

    made = tokenizer(["noto red heart", "bird", "birdie", "third"])
    for word in ("noto", "red", "heart", "bird", "birdie", "third"):
        assert len(made(word).input_ids) == 3  # with start and end
    spelt = made("Zebra").input_ids
    assert len(spelt) > 3
    assert made.unk_token_id not in spelt[1:-1]


def test_the_stock_encoder_is_set_to_the_code_of_patches():
    from encoder import set_encoder
    from latents import PatchCode
    from model import autoencoder

    pictures = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures[:3] = pictures[:3, :, :1, :1]  # pictures of one colour beside noise
    code = PatchCode.of(pictures)
    model = autoencoder()
    set_encoder(model, code)
    with torch.no_grad():
        encoded = model.encode(pictures).latent_dist
    # the code once more, with numpy: every 4 x 4 patch of its own
    for row, down, right in ((0, 0, 0), (4, 3, 9), (5, 15, 15)):
        patch = pictures[row, :, 4 * down : 4 * down + 4, 4 * right : 4 * right + 4].numpy().reshape(48)
        expected = (patch - code.mean.numpy()) @ code.basis.numpy() * code.scale.numpy()
        np.testing.assert_allclose(encoded.mode()[row, :, down, right], expected, atol=4e-3)
    assert encoded.std.max() < 0.01


def test_principal_components_are_those_of_scikit_learn():
    from latents import PatchCode
    from sklearn.decomposition import PCA

    mixed = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 1, 48).view(
        3, 4, 4
    )
    code = PatchCode.of(mixed)
    reference = PCA(8).fit(mixed.view(40, 48).double().numpy())
    overlap = np.abs(reference.components_ @ code.basis.double().numpy())
    np.testing.assert_allclose(overlap, np.eye(8), atol=1e-4)


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures of training, as prepare.py writes them."""
    from latents import PatchCode, as_tensor

    pictures = torch.randint(0, 256, (12, 64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = [
        (style, subject) for style in ("noto", "fluent") for subject in ("bus", "cat", "key", "rose", "sun", "bee")
    ]
    code = vars(PatchCode.of(as_tensor(pictures.numpy())))
    torch.save(
        {"pictures": pictures, "labels": labels, "only_coded": pictures[:4], "code": code}, tmp_path / "pictures.pt"
    )
    return tmp_path


def small_unet():
    from train import UNET

    return {**UNET, "block_out_channels": (16, 16, 16), "attention_head_dim": 1}


def test_a_training_that_is_interrupted_goes_on_bit_for_bit(folder):
    from train import Trainer

    def new():
        return Trainer(folder, batch=4, rate=1e-3, unet=small_unet(), rank=0, world=1)

    whole = new()
    losses = [whole.step() for _ in range(3)]
    first = new()
    assert first.step() == losses[0]
    first.save(folder / "x.pt")
    second = new()
    second.load(folder / "x.pt")
    assert [second.step() for _ in range(2)] == losses[1:]
    for states in ((whole.model, second.model), (whole.average, second.average)):
        expected, found = (state.state_dict() for state in states)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_processes_share_a_batch_of_different_pictures(folder):
    from train import Trainer

    ranks = [Trainer(folder, batch=3, rate=1e-3, unet=small_unet(), rank=rank, world=2) for rank in range(2)]
    epoch = [row for step in range(2) for trainer in ranks for row in trainer.rows(step)]
    assert sorted(epoch) == list(range(12))


def test_the_decoder_goes_on_bit_for_bit(folder):
    from train_autoencoder import Trainer

    whole, first, second = (Trainer(folder, batch=2, rate=1e-3, steps=100) for _ in range(3))
    losses = [whole.step() for _ in range(4)]
    assert [first.step() for _ in range(2)] == losses[:2]
    first.save(folder / "x.pt")
    second.load(folder / "x.pt")
    assert [second.step() for _ in range(2)] == losses[2:]


def test_the_gate_counts_a_wrong_subject_and_a_wrong_style():
    from gate_figures import captions, judge
    from lists import STYLES, SUBJECTS

    labels = [(style, subject) for style in STYLES for subject in SUBJECTS[:80]]
    drawn = np.random.default_rng(0)
    subjects, styles = drawn.normal(size=(80, 64)), 0.5 * drawn.normal(size=(2, 64))
    real = np.array([subjects[place % 80] + styles[place // 80] for place in range(160)])
    asked = [labels[place % 2 * 80 + place] for place in range(64)]
    exact = np.array([real[labels.index(label)] for label in asked])
    figures = judge(exact, asked, real, labels)
    assert (figures["first"], figures["in_five"], figures["style"]) == (1, 1, 1)
    wrong = exact.copy()
    wrong[:7] = real[70:77]  # other subjects, in the first style
    figures = judge(wrong, asked, real, labels)
    assert figures["first"] == pytest.approx(57 / 64)
    assert figures["style"] == pytest.approx(61 / 64)  # of those 7 captions, 3 ask for the second style
    assert figures["kid"] > figures["kid_of_real"] - 1

    chosen = captions()
    assert len({subject for _, subject in chosen}) == 64
    assert [style for style, _ in chosen].count("noto") == 32


def test_muon_makes_the_directions_of_a_matrix_weigh_about_the_same():
    from muon import Muon, orthogonal

    matrix = torch.randn(24, 60, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -1.5, 24)[:, None]
    left, _, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    made = orthogonal(matrix).double().numpy()
    weights = np.diag(left.T @ made @ right.T)
    assert (weights > 0.6).all()
    assert (weights < 1.3).all()
    off = left.T @ made @ right.T - np.diag(weights)
    assert np.abs(off).max() < 0.05
    np.testing.assert_allclose(orthogonal(matrix.T).double(), made.T, atol=1e-6)

    parameter = torch.nn.Parameter(torch.zeros(24, 15, 2, 2))
    parameter.grad = matrix.view(24, 15, 2, 2).clone()
    Muon([parameter], lr=0.1).step()
    # the first update is along the gradient; 0.2 sqrt(60) is the size that Adam's would have
    expected = -0.1 * 0.2 * 60**0.5 * made
    assert np.linalg.norm(parameter.detach().flatten(1).numpy() - expected) < 0.05 * np.linalg.norm(expected)  # bf16


MUON_IN_TWO = """
import sys, torch, torch.distributed as dist
from muon import Muon
rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
parameters = torch.load(sys.argv[3])
moved = [torch.nn.Parameter(value) for value, _ in parameters]
optimizer = Muon(moved, lr=0.1, rank=rank, world=2)
assert set(optimizer.owners) == {0, 1}
for _ in range(2):
    for parameter, (_, grad) in zip(moved, parameters):
        parameter.grad = grad.clone()
    optimizer.step()
torch.save([parameter.detach() for parameter in moved], sys.argv[4 + rank])
"""


def test_two_processes_that_share_the_matrices_move_them_as_one_does(tmp_path):
    from muon import Muon

    made = torch.Generator().manual_seed(0)
    shapes = [(24, 15, 2, 2), (8, 8), (40, 16), (16, 40), (6, 70)]
    both = [(torch.randn(shape, generator=made), torch.randn(shape, generator=made)) for shape in shapes]
    torch.save(both, tmp_path / "both.pt")
    files = [tmp_path / name for name in ("meeting", "both.pt", "0.pt", "1.pt")]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", MUON_IN_TWO, str(rank), *map(str, files)],
            env={**os.environ, "PYTHONPATH": str(TOOLS), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [process.wait(120) for process in running] == [0, 0]
    alone = [torch.nn.Parameter(value.clone()) for value, _ in both]
    optimizer = Muon(alone, lr=0.1)
    for _ in range(2):
        for parameter, (_, grad) in zip(alone, both, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
    for found in (torch.load(file) for file in files[2:]):
        for expected, parameter in zip(alone, found, strict=True):
            torch.testing.assert_close(parameter, expected.detach(), rtol=0, atol=1e-6)


def test_the_rate_falls_to_zero_over_the_last_steps(folder):
    from train import Trainer

    trainer = Trainer(folder, batch=2, rate=1e-3, unet=small_unet(), rank=0, world=1, last=1000, decay=200)
    rates = []
    for step in (799, 900, 999):
        trainer.step_number = step
        trainer.step()
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])
    np.testing.assert_allclose(rates, [[1e-3, 2e-3], [5e-4, 1e-3], [5e-6, 1e-5]])
