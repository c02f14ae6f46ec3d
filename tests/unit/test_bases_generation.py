"""Generation: a batch equals its rows, a stream equals the batch, stops and limits hold."""

from pathlib import Path

import pytest
import torch

from haori import bases
from haori.core.errors import InputError


@pytest.fixture(scope="module")
def model(tiny_base_folder: Path):
    base = bases.find_base(str(tiny_base_folder))
    loaded = bases.load_model(base, dtype="fp32", device="cpu")
    # Random weights are nearly flat; sharper ones make a wrong position or mask change the answer.
    for parameter in loaded.parameters():
        if parameter.ndim == 2:
            parameter.mul_(8.0)
    return loaded


PROMPTS = [[1, 40, 41, 42, 43, 44, 45], [1, 50], [1, 60, 61, 62]]


def slow_twin(model, tokenizer, prompts, **options):
    """Greedy decoding without padding or cache."""
    out = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(options["max_new_tokens"]):
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token in bases.stop_tokens(bases.end_tokens(model), tokenizer):
                break
            ids.append(token)
        out.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    return out


def test_a_batch_is_what_each_prompt_gives_alone(model, tiny_tokenizer) -> None:
    together = bases.generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=12)
    assert together == slow_twin(model, tiny_tokenizer, PROMPTS, max_new_tokens=12)
    assert len(set(together)) == len(PROMPTS)
    assert together == [bases.generate(model, tiny_tokenizer, [p], max_new_tokens=12)[0] for p in PROMPTS]


def test_more_prompts_than_a_batch_keep_their_order(model, tiny_tokenizer) -> None:
    prompts = [[1] + [30 + i] * (1 + i % 5) for i in range(20)]
    answers = bases.generate(model, tiny_tokenizer, prompts, max_new_tokens=4)
    assert answers == slow_twin(model, tiny_tokenizer, prompts, max_new_tokens=4)
    assert bases.generate(model, tiny_tokenizer, []) == []


def test_a_stream_is_the_same_answer_in_pieces(model, tiny_tokenizer) -> None:
    for prompt in PROMPTS:
        pieces = list(bases.stream(model, tiny_tokenizer, prompt, max_new_tokens=12))
        assert "".join(pieces) == bases.generate(model, tiny_tokenizer, [prompt], max_new_tokens=12)[0]
        assert len(pieces) > 1


class _Scripted(torch.nn.Module):
    """Says given tokens one after another; a real model cannot be made to say chosen text."""

    def __init__(self, script: list[int], config, vocabulary: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.script, self.config, self.vocabulary, self.step = script, config, vocabulary, 0

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids, past_key_values, use_cache):
        logits = torch.zeros(1, input_ids.shape[1], self.vocabulary)
        logits[0, -1, self.script[self.step]] = 1.0
        self.step += 1
        return type("Output", (), {"logits": logits, "past_key_values": None})()


@pytest.mark.parametrize("text", ["日本 🎌 ok", "ナ\u0301é end", "plain  words\n\n"])
def test_characters_over_several_tokens_come_whole(model, tiny_tokenizer, text: str) -> None:
    tokens = tiny_tokenizer(text).input_ids
    assert len(tokens) > len(text.split())
    script = _Scripted([*tokens, tiny_tokenizer.eos_token_id], model.config, len(tiny_tokenizer))
    pieces = list(bases.stream(script, tiny_tokenizer, [1], max_new_tokens=100))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert len(pieces) > 1


def test_a_cut_character_is_still_given(model, tiny_tokenizer) -> None:
    tokens = tiny_tokenizer("a🎌").input_ids[:-1]
    script = _Scripted(tokens, model.config, len(tiny_tokenizer))
    pieces = list(bases.stream(script, tiny_tokenizer, [1], max_new_tokens=len(tokens)))
    assert pieces[0] == "a"
    assert "\ufffd" in pieces[-1]


def test_stop_tokens_come_from_everywhere(model, tiny_tokenizer) -> None:
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert bases.stop_tokens(bases.end_tokens(model), tiny_tokenizer) == [end]
    model.generation_config.eos_token_id = [7, 8]
    try:
        assert bases.stop_tokens(bases.end_tokens(model), tiny_tokenizer) == [7, 8, end]
        stopped = bases.generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=30)
        assert stopped == slow_twin(model, tiny_tokenizer, PROMPTS, max_new_tokens=30)
    finally:
        model.generation_config.eos_token_id = end


def test_the_answer_ends_at_a_stop_token(model, tiny_tokenizer) -> None:
    free = bases.generate(model, tiny_tokenizer, [PROMPTS[0]], max_new_tokens=8)[0]
    first = int(model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].argmax())
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = first
    try:
        assert free != ""
        assert bases.generate(model, tiny_tokenizer, [PROMPTS[0]], max_new_tokens=8) == [""]
        assert list(bases.stream(model, tiny_tokenizer, PROMPTS[0], max_new_tokens=8)) == []
    finally:
        model.generation_config.eos_token_id = before


def test_seeds_repeat_and_leave_the_process_alone(model, tiny_tokenizer) -> None:
    options = {"max_new_tokens": 10, "temperature": 2.0}
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = bases.generate(model, tiny_tokenizer, PROMPTS, seed=1, **options)
    streamed = list(bases.stream(model, tiny_tokenizer, PROMPTS[0], seed=1, **options))
    assert torch.equal(before, torch.random.get_rng_state())
    assert bases.generate(model, tiny_tokenizer, PROMPTS, seed=1, **options) == first
    assert bases.generate(model, tiny_tokenizer, PROMPTS, seed=2, **options) != first
    assert list(bases.stream(model, tiny_tokenizer, PROMPTS[0], seed=1, **options)) == streamed
    assert list(bases.stream(model, tiny_tokenizer, PROMPTS[0], seed=2, **options)) != streamed


def test_a_tiny_top_p_is_greedy(model, tiny_tokenizer) -> None:
    greedy = bases.generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=6)
    options = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 1e-6, "seed": 3}
    assert bases.generate(model, tiny_tokenizer, PROMPTS, **options) == greedy
    assert "".join(bases.stream(model, tiny_tokenizer, PROMPTS[0], **options)) == greedy[0]


def test_defaults_that_came_with_the_model_change_nothing(model, tiny_tokenizer) -> None:
    greedy = bases.generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=6)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0)
    try:
        assert bases.generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=6) == greedy
    finally:
        model.generation_config.update(do_sample=False, temperature=1.0, top_k=50, repetition_penalty=1.0)


def test_answers_end_where_the_context_ends(model, tiny_tokenizer) -> None:
    prompt = [1] + [40] * 252
    answer = bases.generate(model, tiny_tokenizer, [prompt], max_new_tokens=50)[0]
    assert answer == slow_twin(model, tiny_tokenizer, [prompt], max_new_tokens=3)[0]
    assert "".join(bases.stream(model, tiny_tokenizer, prompt, max_new_tokens=50)) == answer


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "prompt is empty"),
        ([1] * 256, {}, "256 tokens leaves no room .* context of 256 tokens"),
        ([1], {"max_new_tokens": 0}, "at least 1"),
        ([1], {"temperature": -1.0}, "temperature cannot be -1.0"),
        ([1], {"temperature": float("nan")}, "temperature cannot be nan"),
        ([1], {"top_p": 0.0}, "top_p cannot be 0.0"),
    ],
)
def test_bad_requests_are_refused(model, tiny_tokenizer, prompt, options, words) -> None:
    with pytest.raises(InputError, match=words):
        bases.generate(model, tiny_tokenizer, [prompt], **options)
    with pytest.raises(InputError, match=words):
        bases.stream(model, tiny_tokenizer, prompt, **options)


def test_an_adapter_generates_too_and_its_mode_is_kept(tiny_base_folder: Path, tiny_tokenizer) -> None:
    from peft import LoraConfig, get_peft_model

    base = bases.load_model(bases.find_base(str(tiny_base_folder)), dtype="fp32", device="cpu")
    plain = bases.generate(base, tiny_tokenizer, PROMPTS, max_new_tokens=5)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.train()
    answers = bases.generate(adapted, tiny_tokenizer, PROMPTS, max_new_tokens=5)
    streamed = ["".join(bases.stream(adapted, tiny_tokenizer, p, max_new_tokens=5)) for p in PROMPTS]
    assert adapted.training
    assert answers == streamed != plain
    with adapted.disable_adapter():
        assert bases.generate(adapted, tiny_tokenizer, PROMPTS, max_new_tokens=5) == plain
