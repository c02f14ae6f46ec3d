"""New words beside LoRA on tiny pipelines: their rows are trained, proved, resumed, and read by stock diffusers."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from haori.bases import find_base
from haori.core.errors import FileFormatError, HaoriError, VerificationError
from haori.core.events import discard
from haori.library import Library, blend_stored, export_in_format, import_adapter, verify_adapter
from haori.library.formats.bundled_words import embedding_files, read_embeddings, write_embeddings
from haori.library.formats.format import open_source
from haori.library.formats.registry import read_updates
from haori.tasks.recipe import recipe_from
from haori.training.finish import prove_and_store
from haori.training.preparation import Prepared, prepare
from haori.training.run import train_run
from haori.training.session import Trained, opened_loop, train_prepared
from tests.diffusion_pipelines import flux1, saved, stable_diffusion, stable_diffusion_xl
from tests.pictures import picture_folder

SMALL: dict[str, Any] = {"block_out_channels": (8, 16), "attention_head_dim": 2}
STARTED = "2026-01-01T00:00:00+00:00"
PROMPT = "a <lineart> cat"
ENCODERS = {"sd15": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}
KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


class Run(NamedTuple):
    """A run that has ended, with its folder."""

    prepared: Prepared
    folder: Path
    trained: Trained

    def rows(self) -> dict[str, torch.Tensor]:
        tensors = load_file(self.folder / "adapter" / "adapter_model.safetensors")
        found = {key.split(".")[2]: tensor for key, tensor in tensors.items() if ".words." in key}
        assert tuple(sorted(found)) == ENCODERS[self.prepared.base.name]
        return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from haori.core.settings import settings

    folder = tmp_path_factory.mktemp("words")
    saved(stable_diffusion(**SMALL), folder / "sd15")
    saved(stable_diffusion_xl(), folder / "sdxl")
    picture_folder(folder / "data", 4, size=(32, 32), caption="a <lineart> cat {}")
    yield folder
    settings.cache_clear()


@pytest.fixture(autouse=True)
def shared_home(root: Path, haori_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from haori.core.settings import settings

    monkeypatch.setenv("HAORI_HOME", str(root / "home"))
    settings.cache_clear()


def prepared(root: Path, *overrides: str, base: str = "sd15", data: str = "data") -> Prepared:
    return prepare(recipe(root, *overrides, base=base, data=data))


def recipe(root: Path, *overrides: str, base: str = "sd15", data: str = "data") -> Any:
    document = {"name": "x", "task": "text_to_image", "base": str(root / base), "data": {"path": str(root / data)}}
    fixed = [
        "data.resolution=32", "data.bucket_step=8", "data.validation_share=0", "training.epochs=1",
        "samples.prompts=[]", "samples.steps=2", "training.max_steps=2", "training.save_every=1",
        "training.batch_size=2", "training.dtype=fp32", "optimizer.lr=0.02", "optimizer.word_lr=0.02",
        "words=[{word: <lineart>, vectors: 3, start: cat red}]",
        *([] if any("{kind" in item for item in overrides) else ["method.rank=4"]),
    ]  # fmt: skip
    return recipe_from(document, [*fixed, *overrides])


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Run]:
    """Run SD 1.5 with samples, and SDXL with an average of the weights and LoRA on its text encoders too."""
    from haori.core.settings import settings

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAORI_HOME", str(root / "home"))
        settings.cache_clear()
        for base, more in {
            "sd15": [f"samples.prompts=[{PROMPT}]"],
            "sdxl": ["training.ema=0.5", "training.text_encoder=true", "training.gradient_checkpointing=true"],
        }.items():
            run = prepared(root, f"name={base}-words", *more, base=base)
            folder = root / f"run-{base}"
            folder.mkdir()
            trained = train_prepared(run, folder, None, STARTED, discard)
            prove_and_store(run, folder, trained.record, trained.live, discard)
            found[base] = Run(run, folder, trained)
    settings.cache_clear()
    return found


def stock(root: Path, base: str, lora: Path | None = None, words: Path | None = None) -> Any:
    """Return diffusers' own pipeline with diffusers' own loaders."""
    from diffusers import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(root / base, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if words is not None and base == "sd15":
        pipe.load_textual_inversion(str(words))
    elif words is not None:
        for encoder, key in KEYS.items():
            pipe.load_textual_inversion(
                load_file(words)[key], token="<lineart>", text_encoder=getattr(pipe, encoder),
                tokenizer=getattr(pipe, encoder.replace("text_encoder", "tokenizer")),
            )  # fmt: skip
    if lora is not None:
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    return pipe


@torch.no_grad()
def noise_of(pipe: Any, prompt: str) -> torch.Tensor:
    """Return a stock pipeline's prediction for a prompt, by its own way from text to UNet."""
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    if not hasattr(pipe, "text_encoder_2"):
        return pipe.unet(noisy, 500.0, found[0]).sample
    sizes = torch.tensor([[32, 32, 0, 0, 32, 32]])
    added = {"text_embeds": found[2], "time_ids": sizes}
    return pipe.unet(noisy, 500.0, found[0], added_cond_kwargs=added).sample


@torch.no_grad()
def noise_of_ours(run: Run, prompt: str) -> torch.Tensor:
    """Return the prediction of the saved adapter on its base as the library puts it on."""
    from haori.bases.diffusion import PictureSize
    from haori.library import attach

    base = run.prepared.base
    model = attach(base, run.folder / "adapter", dtype="fp32", device="cpu").eval()
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = {f"tokens_{name}": ids for name, ids in run.prepared.processor.tokens([prompt]).items()}
    sizes = run.prepared.processor.family.sizes([PictureSize((32, 32), (0, 0), (32, 32))])
    return model(noisy=noisy, timesteps=torch.tensor([500.0]), **tokens, **sizes).sample


def test_the_vectors_begin_as_the_start_and_nothing_else_of_the_embedding_moves(root: Path, tmp_path: Path) -> None:
    run = prepared(root, base="sdxl")
    with opened_loop(run, tmp_path) as loop:
        model = loop.model.get_base_model()
        trained = {name for name, weight in loop.model.named_parameters() if weight.requires_grad}
        before = {name: encoder.get_input_embeddings().words.weight.clone()
                  for name, encoder in model.text_encoders.items()}  # fmt: skip
        loop.step(loop.plan(0)[0], last_of_epoch=False)
        after = {name: encoder.get_input_embeddings().words.weight for name, encoder in model.text_encoders.items()}
        for name, encoder in model.text_encoders.items():
            plain = getattr(stock(root, "sdxl"), name).get_input_embeddings().weight
            ids = run.processor.tokenizers[name]("cat red", add_special_tokens=False)["input_ids"]
            assert torch.equal(before[name], plain[[ids[row * len(ids) // 3] for row in range(3)]])
            assert torch.equal(encoder.get_input_embeddings().tokens.weight, plain)
            moved = (after[name] - before[name]).detach().abs()
            assert moved.dtype == torch.float32 and bool((moved > 0).all())
            rates = [
                group["lr"] for group in loop.optimizer.param_groups if any(p is after[name] for p in group["params"])
            ]
            assert float(moved.max()) == pytest.approx(rates[0], rel=0.05)  # AdamW's first step is the rate
    assert {name for name in trained if ".text_encoder" in f".{name}"} == {
        f"base_model.model.{place}.token_embedding.words.modules_to_save.default.weight"
        for place in ("text_encoder.embeddings", "text_encoder_2.text_model.embeddings")
    }


def test_the_gradient_of_a_row_is_that_of_an_embedding_that_diffusers_enlarged(root: Path) -> None:
    from haori.bases.diffusion import PipelineProcessor, load_diffusion_model, put_words
    from haori.core.new_words import NewWord

    base = find_base(str(root / "sd15"))
    processor = PipelineProcessor(base, [NewWord(word="<lineart>", vectors=2, start="red")])
    assert processor.words is not None
    model: Any = load_diffusion_model(base, dtype="fp32", device="cpu", components=("text_encoder",))
    put_words(model, processor.words)
    rows = model.text_encoder.get_input_embeddings().words.weight.requires_grad_(True)
    pipe = stock(root, "sd15")
    pipe.load_textual_inversion(rows.detach().clone(), token="<lineart>")
    prompt = pipe.maybe_convert_prompt(PROMPT, pipe.tokenizer)
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    ours = processor.tokens([PROMPT])["text_encoder"]
    assert torch.equal(ours, ids) and prompt == "a <lineart> <lineart>_1 cat"
    direction = torch.randn(1, 77, 24, generator=torch.Generator().manual_seed(1))
    (model.text_encoder(ours)[0] * direction).sum().backward()
    (pipe.text_encoder(ids)[0] * direction).sum().backward()
    theirs = pipe.text_encoder.get_input_embeddings().weight.grad[-2:]
    assert float(theirs.norm()) > 1e-3
    torch.testing.assert_close(rows.grad, theirs)


@pytest.mark.parametrize("base", ENCODERS)
def test_a_resumed_run_is_the_same_bit_for_bit(runs: dict[str, Run], tmp_path: Path, base: str) -> None:
    run = runs[base]
    first = sorted((run.folder / "checkpoints").iterdir())[0]
    assert first.name.endswith("1")
    shutil.copytree(first, tmp_path / "checkpoints" / first.name)
    train_prepared(run.prepared, tmp_path, first, STARTED, discard)
    one, other = (folder / "adapter" / "adapter_model.safetensors" for folder in (run.folder, tmp_path))
    assert one.read_bytes() == other.read_bytes()
    saved_then = load_file(first / "adapter_model.safetensors")
    assert any(".words." in key and not torch.equal(saved_then[key], load_file(one)[key]) for key in saved_then)


@pytest.mark.parametrize(
    ("base", "encoder"),
    [
        pytest.param("sd15", "text_encoder", marks=pytest.mark.slow),
        pytest.param("sdxl", "text_encoder", marks=pytest.mark.slow),
        ("sdxl", "text_encoder_2"),
    ],
)
def test_a_tenth_of_what_rows_do_is_missed(runs: dict[str, Run], root: Path, tmp_path: Path, base: str, encoder: str):
    """A fault in the rows of one text encoder alone, of a tenth of the way they went."""
    run = runs[base]
    assert run.trained.live is not None
    shutil.copytree(run.folder / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    (key,) = (key for key in tensors if key.startswith(f"base_model.model.{encoder}.") and ".words." in key)
    table = getattr(stock(root, base), encoder).get_input_embeddings().weight.detach()
    words = json.loads((tmp_path / "adapter" / "words.json").read_text())
    begun = table[words["begins"][encoder]]
    live = run.trained.live
    save_file({**tensors, key: tensors[key] - 0.1 * (tensors[key] - begun)}, path, {"format": "pt"})
    found = verify_adapter(
        run.prepared.base, tmp_path / "adapter", dtype="fp32", probes=live.probes, live_logits=live.logits,
        live_words=live.words,
    )  # fmt: skip
    assert [check.name for check in found.failures][-1:] == [f"reload of {encoder}'s words"]


@pytest.mark.parametrize("base", ENCODERS)
def test_stock_diffusers_predicts_the_same_with_the_exported_files(
    runs: dict[str, Run], root: Path, tmp_path: Path, base: str
) -> None:
    out = export_in_format(f"{base}-words", tmp_path / "lineart.safetensors", "diffusers")
    beside = tmp_path / "lineart_lineart.safetensors"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lineart.safetensors", beside.name]
    assert set(load_file(beside)) == ({"<lineart>"} if base == "sd15" else {"clip_l", "clip_g"})
    bare = noise_of(stock(root, base, out, None), PROMPT)
    theirs, ours = noise_of(stock(root, base, out, beside), PROMPT), noise_of_ours(runs[base], PROMPT)
    assert (theirs - bare).norm() > 1e-3 * bare.norm()  # which the words do beside LoRA
    assert (theirs - ours).norm() < 1e-3 * (theirs - bare).norm()
    with pytest.raises(HaoriError, match="already exists"):
        export_in_format(f"{base}-words", tmp_path / "lineart.safetensors", "diffusers")
    out.unlink()
    with pytest.raises(HaoriError, match=r"lineart_lineart\.safetensors', which goes with"):
        export_in_format(f"{base}-words", tmp_path / "lineart.safetensors", "diffusers")
    assert not out.exists()


def test_a_sample_is_what_the_stock_pipeline_draws(runs: dict[str, Run], root: Path, tmp_path: Path) -> None:
    out = export_in_format("sd15-words", tmp_path / "out", "diffusers") / "pytorch_lora_weights.safetensors"
    last = sorted((runs["sd15"].folder / "samples").glob("*.png"))[-1]
    shown = np.asarray(Image.open(last), dtype=float)
    drawn = {}
    for name, words in (("with", out.with_name("pytorch_lora_weights_lineart.safetensors")), ("without", None)):
        pipe = stock(root, "sd15", out, words)
        picture = pipe(prompt=PROMPT, width=32, height=32, num_inference_steps=2,
                       generator=torch.Generator().manual_seed(0)).images[0]  # fmt: skip
        drawn[name] = np.abs(np.asarray(picture, dtype=float) - shown)
    assert drawn["with"].max() <= 1 < drawn["without"].max()


@pytest.mark.parametrize("base", ENCODERS)
def test_a_file_of_kohya_bundles_the_vectors(runs: dict[str, Run], tmp_path: Path, base: str) -> None:
    """Parsed as AUTOMATIC1111 does: the name up to the first point, then what the vectors are for."""
    out = export_in_format(f"{base}-words", tmp_path / "lineart.safetensors", "kohya")
    bundled: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(out).items():
        head, _, rest = key.partition(".")
        if head == "bundle_emb":
            name, kind = rest.split(".", 1)
            bundled.setdefault(name, {})[kind] = tensor
    rows = runs[base].rows()
    assert set(bundled) == {"<lineart>"}
    assert {kind: tensor.tolist() for kind, tensor in bundled["<lineart>"].items()} == {
        KEYS[encoder]: rows[encoder].tolist() for encoder in ENCODERS[base]
    }


@pytest.mark.parametrize("kind", ["kohya", pytest.param("diffusers", marks=pytest.mark.slow), "folder"])
def test_files_come_back_with_their_words(runs: dict[str, Run], root: Path, tmp_path: Path, kind: str) -> None:
    base = find_base(str(root / "sdxl"))
    out = tmp_path / ("out" if kind == "folder" else "lineart.safetensors")
    export_in_format("sdxl-words", out, "kohya" if kind == "kohya" else "diffusers")
    stored = import_adapter(out, base, name=f"back-{kind}")
    assert stored.card.trigger_words == ("<lineart>",)
    assert stored.card.verification is not None and "new words <lineart>" in stored.card.verification.checks[0].detail
    mine, back = read_updates(runs["sdxl"].folder / "adapter"), read_updates(stored.path)
    assert mine.extra.keys() == back.extra.keys() == {f"bundle_emb.<lineart>.{key}" for key in KEYS.values()}
    for key, tensor in mine.extra.items():
        assert torch.equal(tensor, back.extra[key])
    export_in_format(stored.name, tmp_path / "again.safetensors", "diffusers")
    assert torch.equal(load_file(tmp_path / "again_lineart.safetensors")["clip_g"], mine.extra[
        "bundle_emb.<lineart>.clip_g"])  # fmt: skip


def test_files_that_lost_or_changed_their_words_are_refused(runs: dict[str, Run], root: Path, tmp_path: Path) -> None:
    base = find_base(str(root / "sdxl"))
    out = export_in_format("sdxl-words", tmp_path / "lineart.safetensors", "diffusers")
    beside = tmp_path / "lineart_lineart.safetensors"
    narrow = {key: tensor[:, :4].contiguous() for key, tensor in load_file(beside).items()}
    save_file(narrow, beside)
    with pytest.raises(VerificationError, match=r"'bundle_emb\.<lineart>\.clip_l' is 4 wide"):
        import_adapter(out, base, name="narrow")
    save_file({"other": torch.ones(1, 8)}, beside)
    with pytest.raises(FileFormatError, match="holds 'other'"):
        import_adapter(out, base, name="other")
    beside.unlink()
    with pytest.raises(FileFormatError, match="which is not beside it; keep the files together"):
        import_adapter(out, base, name="lost")
    folder = shutil.copytree(runs["sdxl"].folder / "adapter", tmp_path / "adapter")
    (folder / "words.json").unlink()
    with pytest.raises(FileFormatError, match=r"words\.json that names them is missing"):
        read_updates(folder)


def test_several_words_keep_their_order_and_have_a_file_each(tmp_path: Path) -> None:
    """The proof in the stock pipeline gives ids in this order, and pipelines do as they load the files."""
    extra = {f"bundle_emb.{word}.clip_l": torch.randn(count, 8) for word, count in (("<b>", 2), ("<a>", 1), ("~b", 1))}
    header = write_embeddings(tmp_path / "x.safetensors", extra)
    save_file({"unet.a.lora_A.weight": torch.ones(1, 2)}, tmp_path / "x.safetensors", header)
    source = open_source(tmp_path / "x.safetensors")
    files = embedding_files(source)
    assert [(word, path.name) for word, path in files.items()] == [
        ("<b>", "x_b.safetensors"), ("<a>", "x_a.safetensors"), ("~b", "x_word3.safetensors"),
    ]  # fmt: skip
    found = read_embeddings(source)
    assert list(found) == list(extra) and all(torch.equal(found[key], extra[key]) for key in extra)


@pytest.mark.parametrize("wanted", ["peft", "comfyui"])
def test_formats_without_a_place_for_words_name_them(runs: dict[str, Run], tmp_path: Path, wanted: str) -> None:
    with pytest.raises(HaoriError, match=r"no place for the vectors of the new words <lineart>; write .* as kohya"):
        export_in_format("sd15-words", tmp_path / "out", wanted)
    assert not list(tmp_path.iterdir())


def test_a_blend_keeps_the_words_and_a_merge_refuses_them(runs: dict[str, Run], root: Path, tmp_path: Path) -> None:
    from haori.library.checkpoints.plan import plan_merge
    from haori.library.checkpoints.tensors import BaseTensors

    stored = blend_stored([("sd15-words", 0.5)], "half").stored
    assert list(read_updates(stored.path).extra) == ["bundle_emb.<lineart>.clip_l"]
    updates = read_updates(Library().get("sd15-words").path)
    with pytest.raises(HaoriError, match="brings the new words <lineart>"):
        plan_merge(BaseTensors(find_base(str(root / "sd15"))), updates, adapter="x")


def test_a_text_encoder_of_an_old_configuration_pools_at_the_end(root: Path, tmp_path: Path) -> None:
    """SDXL's configuration has the end token 2, with which transformers pools at the largest id: a new word's."""
    from haori.bases.diffusion import PipelineProcessor, load_diffusion_model, put_words
    from haori.core.new_words import NewWord

    folder = shutil.copytree(root / "sdxl", tmp_path / "old")
    path = folder / "text_encoder_2" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 2}))
    pooled = {}
    for name in ("old", "new"):
        base = find_base(str(folder if name == "old" else root / "sdxl"))
        processor = PipelineProcessor(base, [NewWord(word="<lineart>", start="red")])
        assert processor.words is not None
        model: Any = load_diffusion_model(base, dtype="fp32", device="cpu")
        put_words(model, processor.words)
        with torch.no_grad():
            pooled[name] = model.family.embed(model.text_encoders, processor.tokens([PROMPT]))["pooled"]
    assert torch.equal(pooled["old"], pooled["new"])


REFUSED = {
    "sd15": [
        (["words=[cat]"], "'cat' is a word that the base has"),
        (["words=[<lineart>, <lineart>]"], "names a word twice"),
        (["words=[<line>, x<line>]"], "'<line>' is a part of 'x<line>'"),
        (["words=[<other>]"], "'<other>' is in no caption of the training pictures.*data.trigger='<other>'"),
        (["words=[LineArt]"], r"words\.0\.word"),
        (["words=[]"], "'optimizer.word_lr' is the rate of new words"),
        (["method={kind: full}"], "'words' is for adapters"),
        (["method.trainable_tokens=[cat]"], r"Learn a new word instead, such as words=\['<lineart>'\]"),
        (["from=sd15-words"], "'words' begins new words, and 'from' goes on"),
        (["from=sd15-words", "words=[]", "optimizer.word_lr=auto"], "it brings the new words <lineart>"),
    ],
    "flux": [([], "'text_encoder_2' of 'flux' is a T5EncoderModel; leave 'words' out")],
}


@pytest.mark.parametrize("base", REFUSED)
def test_what_cannot_be_a_new_word_is_a_sentence(runs: dict[str, Run], root: Path, base: str) -> None:
    if base == "flux":
        saved(flux1(), root / "flux")
    for overrides, said in REFUSED[base]:
        with pytest.raises(HaoriError, match=said):
            prepared(root, *overrides, base=base)


def test_a_peft_folder_is_refused_before_the_training(root: Path, tmp_path: Path) -> None:
    with pytest.raises(HaoriError, match="--out writes a PEFT folder, which has no place for new words"):
        train_run(recipe(root), out=tmp_path / "out")


def test_the_trigger_may_be_the_new_word_and_prompts_use_it(root: Path) -> None:
    picture_folder(root / "plain", 4, size=(32, 32), caption="a cat {}")
    more = ["data.trigger=<lineart>", "words=[<lineart>]", "samples.prompts=auto", "optimizer.word_lr=auto"]
    run = prepared(root, *more, data="plain")
    words = run.processor.words
    assert words.words[0].start == "lineart" and words.first == {"text_encoder": 86}
    assert all("<lineart>" in prompt for prompt in run.recipe.samples.prompts)
    assert run.task.rate(run.recipe, "base_model.model.text_encoder.x.token_embedding.words.weight") == 5e-4 / 0.02
    assert run.task.rate(run.recipe, "base_model.model.unet.x.lora_A.default.weight") == 1.0
    batch = run.train.batch([0])
    assert 86 in batch.groups[0].inputs["tokens_text_encoder"]


def test_what_a_caption_loses_is_told_without_the_tokens_of_its_words(root: Path) -> None:
    processor = prepared(root).processor
    assert processor.cut("a <lineart> cat") == ""
    assert processor.cut("b" * 73 + " <lineart> red") == "<lineart> red"
